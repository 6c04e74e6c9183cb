"""Damages one file of a folder in many ways and loads the folder each time: what tests/test_malformed_files.py runs.

    python -m tests.malformed '[{"kind": "model", "folder": "FOLDER", "seed": 0, "cases": 100}]'

kind: model, adapter or rlds; the folder is changed and restored. Prints one JSON line before each case and one after
it, so that a case that ends the interpreter is known. Outcomes: refused (ValueError or OSError that names a file of the
folder), same (the original's values), different (other values), or anything else, which is a fault.
"""

import contextlib
import copy
import faulthandler
import hashlib
import json
import random
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CASE_TIMEOUT_S = 20
HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3.5, 10**30, -1e308, float("nan"), "", "x", "../../etc/passwd", "/etc/passwd", [], {}, [[]],
    [None], {"a": 1}, "os.system", "hf-hub:evil/model", "\x00", "\u2028" * 50, [0] * 100, 1 << 40,
)  # fmt: skip
HOSTILE_FIELDS: dict[str, Any] = {
    "attn_implementation": "evil/kernel", "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
    "quantization_config": {"quant_method": "evil"}, "configuration_files": ["config.9.0.0.json"],
    "transformers_weights": "../evil.safetensors", "tokenizer_file": "/etc/passwd", "vocab_file": "../../secret",
    "megatron_config": {"a": 1}, "megatron_core": "evil", "normalize": "shadow", "pythonClassName": "evil.Evil",
    "moduleName": "evil", "filepathTemplate": "../{DATASET}", "name": "../../evil",
}  # fmt: skip
Mutation = tuple[str, Callable[[], None]]


class Hang(BaseException):
    """A case took longer than CASE_TIMEOUT_S; not an Exception, so that no handler takes it for a bad file."""


# ------------------------------------------------------------------------------------------- damage to one file


def damage_bytes(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Truncated, bit-flipped, zeroed, shortened, lengthened or replaced bytes, and what was done."""
    size = max(len(data), 1)
    at = rng.randrange(size)
    if rng.random() < 0.5:
        at = min(at, rng.randrange(2000))  # headers are at the beginning
    length = rng.randrange(1, 200)
    kind = rng.choice(
        ("truncate", "flip", "flip", "flip", "zero", "cut", "insert", "empty", "garbage", "append")
    )
    if kind == "flip":
        changed = bytearray(data or b"\0")
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            place = rng.randrange(len(changed)) if rng.random() < 0.5 else at
            changed[place] ^= 1 << rng.randrange(8)
        return f"flip near {at}", bytes(changed)
    changed_bytes = {
        "truncate": data[:at],
        "zero": data[:at] + bytes(len(data[at : at + length])) + data[at + length :],
        "cut": data[:at] + data[at + length :],
        "insert": data[:at] + rng.randbytes(length) + data[at:],
        "empty": b"",
        "garbage": rng.randbytes(length * 10),
        "append": data + rng.randbytes(length),
    }[kind]
    return f"{kind} at {at}", changed_bytes


def damage_json(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """One value replaced by a hostile one, one key removed, or a hostile field added."""
    tree = json.loads(data)
    places = list(_places(tree))
    container, key = rng.choice(places) if places else (tree, None)
    kind = rng.choice(("replace", "replace", "remove", "add", "deep"))
    if kind == "add" or key is None:
        name = rng.choice(sorted(HOSTILE_FIELDS))
        objects = [tree, *(c for c, _ in places if isinstance(c, dict))]
        rng.choice([o for o in objects if isinstance(o, dict)])[name] = HOSTILE_FIELDS[name]
        return f"add {name}", json.dumps(tree).encode()
    if kind == "deep":
        return "nest 100,000 lists", b"[" * 100_000
    if kind == "remove":
        del container[key]
        return f"remove {key}", json.dumps(tree).encode()
    container[key] = rng.choice(HOSTILE_VALUES)
    return f"{key} = {str(container[key])[:30]!r}", json.dumps(tree).encode()


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    for key in (
        list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    ):
        yield node, key
        yield from _places(node[key])


def damage_safetensors(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A header that says something else: names, shapes, types, offsets, or its own length."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    kind = rng.choice(
        (
            "drop",
            "rename",
            "shape",
            "dtype",
            "offsets",
            "overlap",
            "length",
            "extra",
            "transpose",
            "type",
        )
    )
    if kind == "drop":
        del header[name]
    elif kind == "rename":
        header[f"{name}.x"] = header.pop(name)
    elif kind == "shape":
        header[name]["shape"] = rng.choice(
            ([0], [-1], [1 << 60, 1 << 60], [*header[name]["shape"], 1], [], "x", None)
        )
    elif kind == "dtype":
        header[name]["dtype"] = rng.choice(
            ("I32", "F64", "BOOL", "F8_E4M3", "U32", "COMPLEX", None, 7)
        )
    elif kind == "offsets":
        header[name]["data_offsets"] = rng.choice(
            ([0, 1 << 62], [-4, 0], [8, 4], [0], "0-4", [1.5, 2])
        )
    elif kind == "overlap":
        header[name]["data_offsets"] = header[other]["data_offsets"]
    elif kind == "transpose":
        header[name]["shape"] = [*reversed(header[name]["shape"]), 1]
    elif kind == "type":
        header[name] = rng.choice(HOSTILE_VALUES)
    elif kind == "extra":
        header["extra"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps(header).encode()
    claimed = (
        rng.choice((0, len(text) - 1, len(data) * 2, 1 << 63, (1 << 64) - 1))
        if kind == "length"
        else len(text)
    )
    return f"{kind} {name}", struct.pack("<Q", claimed) + text + body


def damage_index(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Shards outside of the folder, that are not there, swapped, or no names at all."""
    index = json.loads(data)
    weight_map = index["weight_map"]
    name = rng.choice(sorted(weight_map))
    shards = sorted(set(weight_map.values()))
    value = rng.choice(("../x.safetensors", "/etc/passwd", "missing.safetensors", "", 7, None, "a/../b.safetensors",
                        "..\\x.safetensors", ["a"], *(s for s in shards if s != weight_map[name])))  # fmt: skip
    weight_map[name] = value
    return f"{name} in {value!r}", json.dumps(index).encode()


def damage_records(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """TFRecord whose CRCs are right and whose length or protobuf is not; or records lost and doubled."""
    from prismatic.vla.datasets.tfrecord import masked_crc32c

    (length,) = struct.unpack("<Q", data[:8])
    kind = rng.choice(("length", "protobuf", "protobuf", "protobuf", "lose", "double"))
    if kind == "length":
        claimed = struct.pack(
            "<Q", rng.choice((0, 1 << 62, (1 << 64) - 1, length - 1, length + 1, 1 << 40))
        )
        return "length with its CRC", claimed + struct.pack("<I", masked_crc32c(claimed)) + data[
            12:
        ]
    if kind == "protobuf":
        what, record = damage_bytes(data[12 : 12 + length], rng)
        head = struct.pack("<Q", len(record))
        head += struct.pack("<I", masked_crc32c(head))
        return f"protobuf {what}", head + record + struct.pack("<I", masked_crc32c(record)) + data[
            16 + length :
        ]
    first = data[: 16 + length]
    return f"{kind} a record", data[len(first) :] if kind == "lose" else first + data


def mutation(folder: Path, rng: random.Random) -> tuple[str, str, Path, bytes | None]:
    """(file name, what was done, file, new bytes or None to remove it): one random damage to one file of `folder`."""
    file = rng.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    data = file.read_bytes()
    if rng.random() < 0.04:
        return file.name, "remove the file", file, None
    shaped = damage_bytes
    if rng.random() < 0.6:
        if file.name.endswith(".index.json"):
            shaped = damage_index
        elif file.suffix == ".json":
            shaped = damage_json
        elif file.suffix == ".safetensors":
            shaped = damage_safetensors
        elif "tfrecord" in file.name:
            shaped = damage_records
    what, changed = shaped(data, rng)
    return file.name, f"{shaped.__name__}: {what}", file, changed


# ------------------------------------------------------------------------------------------- what is loaded


def digest(*values: Any) -> str:
    """SHA-256 over arrays, tensors and whatever JSON knows."""
    import numpy as np

    total = hashlib.sha256()
    for value in values:
        is_array = hasattr(value, "shape")
        total.update(
            np.ascontiguousarray(value).tobytes()
            if is_array
            else json.dumps(value, sort_keys=True).encode()
        )
    return total.hexdigest()


class ModelFolder:
    """A model folder: everything that is made of one."""

    def __init__(self, folder: Path) -> None:
        from prismatic.extern.hf import modeling_prismatic, processing_prismatic
        from prismatic.vla import action_normalization
        from utils import checkpoint_utils

        self.folder, self.check = folder, checkpoint_utils.check_model_dir
        self.loaders: dict[str, Callable[[Path], Any]] = {
            "model": modeling_prismatic.load_model,
            "processor": processing_prismatic.load_processor,
            "statistics": action_normalization.load_norm_stats,
        }

    def load(self) -> str:
        import numpy as np

        processor, model = (
            self.loaders["processor"](self.folder),
            self.loaders["model"](self.folder),
        )
        image = np.arange(28 * 28 * 3, dtype=np.uint8).reshape(28, 28, 3)
        pixels = processor.image_processor(image).pixel_values
        weights = [tensor.numpy() for _, tensor in sorted(model.state_dict().items())]
        return digest(
            processor.prompt_ids("push the red block"), pixels.numpy(), model.norm_stats,
            self.loaders["statistics"](self.folder), *weights,
        )  # fmt: skip

    def refuses(self, name: str) -> None:
        """Raise what the loader that reads file `name` raises; `check` has found a problem."""
        if (
            name == "checksums.json"
        ):  # read by all of them; what only `check` misses is a file that none of them reads
            for loader in self.loaders.values():
                loader(self.folder)
            raise ValueError(self.check(self.folder)[0])
        if name.endswith((".safetensors", ".index.json")) or name == "config.json":
            self.loaders["model"](self.folder)
        elif name == "dataset_statistics.json":
            self.loaders["statistics"](self.folder)
        else:
            self.loaders["processor"](self.folder)
        raise AssertionError("check_model_dir refuses what the loader takes")


class AdapterFolder:
    """An adapter folder beside its base `base/`."""

    def __init__(self, folder: Path) -> None:
        from prismatic.extern.hf.modeling_prismatic import load_model
        from utils import checkpoint_utils, peft_utils

        self.folder, self.base = folder, folder.parent / "base"
        self._check, self._fits = checkpoint_utils.check_adapter_dir, peft_utils.check_adapter_fits
        self._load, self._model = peft_utils.load_lora, load_model(self.base)

    def check(self, folder: Path) -> list[str]:
        return self._check(folder) or self._fits(folder, self.base)

    def load(self) -> str:
        wrapper = self._load(copy.deepcopy(self._model), self.folder)
        config = wrapper.peft_config["default"]
        factors = [
            p.detach().numpy() for n, p in sorted(wrapper.named_parameters()) if "lora_" in n
        ]
        return digest(config.r, config.lora_alpha, config.lora_dropout, *factors)

    def refuses(self, name: str) -> None:
        if name not in ("base_model.json", "dataset_statistics.json", "checksums.json"):
            self._load(copy.deepcopy(self._model), self.folder)
        raise ValueError(self.check(self.folder)[0])


class RldsFolder:
    """A dataset directory `<root>/<name>/1.0.0`: its statistics and all of its steps."""

    def __init__(self, folder: Path) -> None:
        from prismatic.vla.datasets import schema
        from prismatic.vla.datasets.tensorflow_setup import load_tfds

        load_tfds()
        self.folder, self.check = folder, schema.check_dataset_dir

    def load(self) -> str:
        from prismatic.vla.datasets.dataset import load_specs
        from prismatic.vla.datasets.sources import MemorySource, Reading
        from prismatic.vla.datasets.statistics import load_dataset_statistics

        root, name = self.folder.parents[1], self.folder.parent.name
        statistics = load_dataset_statistics(root, name)
        source = MemorySource(load_specs(root, name), Reading((32, 32), train=False))
        parts = [
            part
            for c in source.chunks()
            for part in (c.images_CHW3, c.actions_CA, list(c.instructions))
        ]
        return digest(statistics, *parts)

    def refuses(self, name: str) -> None:
        self.load()
        raise AssertionError("check_dataset_dir refuses what the reader takes")


KINDS = {"model": ModelFolder, "adapter": AdapterFolder, "rlds": RldsFolder}


def outcome(target: Any, name: str, original: str) -> str:
    """What loading the damaged folder does; see the module."""
    try:
        if problems := target.check(target.folder):
            if (
                not all(isinstance(problem, str) for problem in problems)
                or str(target.folder) not in problems[0]
            ):
                return f"does not name a file: {problems}"
            target.refuses(name)
        return "same" if target.load() == original else "different"
    except (ValueError, OSError) as error:
        return "refused" if str(target.folder) in str(error) else f"does not name a file: {error!r}"
    except (Exception, Hang) as error:
        return f"raised {type(error).__name__}: {str(error)[:300]}"


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """End the block with Hang after CASE_TIMEOUT_S, or the process (with its stacks) where Python gets no turn."""

    def stop(*_: Any) -> None:
        raise Hang(f"no end after {CASE_TIMEOUT_S} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(CASE_TIMEOUT_S)
    faulthandler.dump_traceback_later(3 * CASE_TIMEOUT_S, exit=True)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()


def run(kind: str, folder: Path, seed: int, cases: int) -> None:
    """Damage `folder` in as many ways; see the module."""
    target = KINDS[kind](folder)
    original = target.load()
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    for case in range(cases):
        name, what, file, changed = mutation(folder, random.Random(f"{kind} {seed} {case}"))
        print(
            json.dumps({"folder": str(folder), "case": case, "file": name, "what": what}),
            flush=True,
        )
        if changed is None:
            file.unlink()
        else:
            file.write_bytes(changed)
        with watched():
            found = "same" if changed == files[name] else outcome(target, name, original)
        print(json.dumps({"outcome": found}), flush=True)
        for extra in folder.iterdir():
            if extra.name not in files:  # the statistics' cache
                extra.unlink()
        file.write_bytes(files[name])
    assert target.load() == original, "a case left something behind"


def remember_shapes() -> None:
    """Build each described model once: most cases leave the configuration as it is, and building takes longest."""
    from prismatic.extern.hf import modeling_prismatic

    build, known = modeling_prismatic.parameter_shapes, {}

    def parameter_shapes(config: Any) -> dict[str, tuple[int, ...]]:
        key = config.to_json_string(use_diff=False)
        if key not in known:
            known[key] = build(config)
        return known[key]

    modeling_prismatic.parameter_shapes = parameter_shapes


if __name__ == "__main__":
    remember_shapes()
    for job in json.loads(sys.argv[1]):
        run(job["kind"], Path(job["folder"]), job["seed"], job["cases"])
