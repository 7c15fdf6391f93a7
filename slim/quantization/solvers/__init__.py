"""What finds codes, scales and zero points for given weights and Hessians: functions on tensors."""
