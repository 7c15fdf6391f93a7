"""Other engines: speed, memory and perplexity of a checkpoint in llama.cpp or vLLM themselves."""
