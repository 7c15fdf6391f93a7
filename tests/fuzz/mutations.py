"""Random mutations of JSON documents, tensors and files, drawn by hypothesis."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from hypothesis import strategies as st

# What a field may hold by mistake: other types, numbers out of range, values of other libraries.
VALUES = (
    None, True, False, 0, 1, 2, 3, 7, -1, 1000, 2**31, 0.0, 0.5, -1.5, float("nan"), float("inf"),
    "", "x", "auto", "None", "float8", "llama", "gelu", "\ud83d", [], [0], ["x"], [[]], {},
    {"x": 1},
)  # fmt: skip
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool)

Path = tuple[str | int, ...]


def paths(document: Any, below: Path = (), widest: int = 40) -> list[Path]:
    """Return the paths of all values in a JSON document; of wide containers only the first and the
    last ones."""
    if isinstance(document, dict):
        keys: list = list(document)
    elif isinstance(document, list):
        keys = list(range(len(document)))
    else:
        return []
    if len(keys) > widest:
        keys = [*keys[:2], *keys[-2:]]
    found = []
    for key in keys:
        found.append((*below, key))
        found.extend(paths(document[key], (*below, key), widest))
    return found


@st.composite
def changed_documents(draw, document: dict) -> tuple[str, dict]:
    """Draw a document with one to three entries dropped, renamed, retyped or swapped.

    Returns:
        What was done, and the document.
    """
    changed = json.loads(json.dumps(document))  # nothing in it is shared
    done = []
    for _ in range(draw(st.integers(1, 3))):
        places = paths(changed)
        if not places:
            break
        place = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(("drop", "rename", "retype", "swap")))
        container, key = _at(changed, place[:-1]), place[-1]
        if kind == "drop":
            del container[key]
            done.append(f"drop {place}")
        elif kind == "rename" and isinstance(container, dict):
            name = draw(st.sampled_from((f"{key}_", f"_{key}", "x", "type", "name")))
            container[name] = container.pop(key)
            done.append(f"rename {place} to {name}")
        elif kind == "swap":
            rival = draw(st.sampled_from(places))
            if rival[: len(place)] == place or place[: len(rival)] == rival:
                continue
            second = _at(changed, rival[:-1])
            first_value, second_value = container[key], second[rival[-1]]
            container[key] = second_value
            second[rival[-1]] = first_value
            done.append(f"swap {place} and {rival}")
        else:
            value = draw(st.sampled_from(VALUES))
            container[key] = copy.deepcopy(value)
            done.append(f"set {place} to {value!r}")
    return "; ".join(done), changed


def _at(document: Any, place: Path) -> Any:
    for key in place:
        document = document[key]
    return document


@st.composite
def changed_tensors(draw, tensors: dict[str, torch.Tensor]) -> tuple[str, dict]:
    """Draw a model's tensors with one or two dropped, renamed, resized, retyped, swapped, doubled
    or added."""
    changed = dict(tensors)
    done = []
    kinds = ("drop", "rename", "resize", "retype", "swap", "double", "add", "prefix", "values")
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(changed)))
        kind = draw(st.sampled_from(kinds))
        done.append(f"{kind} {name}")
        if kind == "drop":
            del changed[name]
        elif kind == "rename":
            changed[draw(st.sampled_from(_other_names(name)))] = changed.pop(name)
        elif kind == "resize":
            changed[name] = _resized(draw, changed[name])
        elif kind == "retype":
            changed[name] = changed[name].to(draw(st.sampled_from(DTYPES)))
        elif kind == "swap":
            rival = draw(st.sampled_from(sorted(changed)))
            done[-1] += f" and {rival}"
            first = changed[name]
            changed[name] = changed[rival].clone()
            changed[rival] = first.clone()
        elif kind == "double":
            changed[draw(st.sampled_from(_other_names(name)))] = changed[name].clone()
        elif kind == "add":
            extra = draw(st.sampled_from(("q_proj.bias", "rotary_emb.inv_freq", "gate.weight")))
            changed[f"{name.rpartition('.')[0]}.{extra}"] = torch.ones(4)
        elif kind == "prefix":
            prefix = draw(st.sampled_from(("_orig_mod.", "module.", "base_model.", "x.")))
            changed = {prefix + key: tensor for key, tensor in changed.items()}
        else:
            value = draw(st.sampled_from((0.0, 1e30, float("nan"), float("inf"))))
            changed[name] = torch.full_like(changed[name], value)
    return "; ".join(done), changed


def _other_names(name: str) -> tuple[str, ...]:
    """Return names that a tensor has in other tools, or by mistake."""
    return (
        name.removeprefix("model."),
        f"model.{name}",
        name.replace("layers.0", "layers.7"),
        name.replace("layers.0", "layers.1"),
        name.replace("weight", "bias"),
        name.replace("model.", "transformer."),
        f"{name}_",
    )


def _resized(draw, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with rows or columns more or fewer, none at all, or another dimension."""
    kind = draw(st.sampled_from(("fewer", "more", "none", "flat", "deep", "turned")))
    if kind == "fewer":
        return tensor[: max(1, len(tensor) - 3)].clone()
    if kind == "more":
        return torch.cat([tensor, tensor[:3]])
    if kind == "none":
        return tensor[:0].clone()
    if kind == "flat":
        return tensor.flatten().clone()
    if kind == "deep":
        return tensor[None].clone()
    return tensor.T.contiguous().clone()


@st.composite
def changed_bytes(draw, content: bytes) -> tuple[str, bytes]:
    """Draw a file cut off, with a piece overwritten, in another encoding, or with something put in
    front."""
    kind = draw(st.sampled_from(("cut", "overwrite", "encode", "front", "behind", "empty")))
    if kind == "cut":
        length = draw(st.integers(0, len(content)))
        return f"cut at {length}", content[:length]
    if kind == "overwrite":
        place = draw(st.integers(0, max(0, len(content) - 1)))
        piece = draw(st.sampled_from((b"\xff", b"\0\0", b"{", b'"', b"]", b"\xed\xa0\xbd", b"\n")))
        return f"{piece!r} at {place}", content[:place] + piece + content[place + len(piece) :]
    if kind == "encode":
        encoding = draw(st.sampled_from(("utf-16", "utf-16-le", "utf-8-sig", "utf-32", "latin-1")))
        text = content.decode("utf-8", errors="replace")
        return f"as {encoding}", text.encode(encoding, errors="replace")
    if kind == "front":
        piece = draw(st.sampled_from((b"\xef\xbb\xbf", b"[", b"\n\n", b"x", b"PK\x03\x04")))
        return f"{piece!r} in front", piece + content
    if kind == "behind":
        return "more at the end", content + draw(st.sampled_from((b"x", b"]", b"\n\n", b"\xff")))
    return "empty", b""
