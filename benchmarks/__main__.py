"""Compile a model, measure it beside its peers in turn, write JSON, a table and a picture.

    python -m benchmarks MODEL_FOLDER TEXT_FILE [--only decode,prefill] [--peers openvino]
                         [--recipes w4,w3] [--rounds 7] [--threads 2] [--output build/bench]
                         [--fresh]

What a part has measured is written at once, and is not measured again by a later run with the same
output unless --fresh is given. Parts and peers are chosen by name.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import qc
from benchmarks.parts import PARTS, Setting
from benchmarks.peers import PEER_MAKERS, Contender, prepare
from benchmarks.table import draw, markdown

ARTIFACTS = Path("build/bench-artifacts")


def main(arguments: list[str]) -> None:
    """Measure what is asked for."""
    asked = parse(arguments)
    results_file = Path(f"{asked.output}.json")
    results_file.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    if results_file.exists() and not asked.fresh:
        results = json.loads(results_file.read_text())

    def keep(**found: Any) -> None:
        results.update(found)
        results_file.write_text(json.dumps(results, indent=1))

    contenders: dict[str, Contender] = {}
    for recipe in asked.recipes:
        contenders[f"qc {recipe}"] = compiled(asked.model, recipe, asked.fresh)
    left_out = {}
    for name, peer in prepare(asked.model, asked.peers):
        if isinstance(peer, str):
            left_out[name] = peer
            say(f"{name} is left out: {peer}")
        else:
            contenders[peer.name] = peer
    keep(model=str(asked.model), command=" ".join(arguments), left_out=left_out)
    setting = Setting(
        asked.model,
        asked.text.read_text(encoding="utf-8"),
        contenders,
        f"qc {asked.recipes[0]}",
        asked.threads,
        asked.rounds,
        f"cpu-{asked.recipes[0]}",
    )
    for number, part in enumerate(asked.only, 1):
        if part in results and not asked.fresh:
            say(f"[{number}/{len(asked.only)}] {part}: measured before")
            continue
        say(f"[{number}/{len(asked.only)}] {part} ...")
        start = time.perf_counter()
        found = PARTS[part](setting)
        keep(**{part: {**found, "rounds": asked.rounds, "load_average": os.getloadavg()[0]}})
        say(f"[{number}/{len(asked.only)}] {part}: {time.perf_counter() - start:.0f} s")
        Path(f"{asked.output}.md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))
    draw(results_file, Path(f"{asked.output}.png"))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--only", type=names(PARTS), default=tuple(PARTS))
    parser.add_argument("--peers", type=names(PEER_MAKERS), default=tuple(PEER_MAKERS))
    parser.add_argument("--recipes", type=lambda text: tuple(text.split(",")), default=("w4",))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--fresh", action="store_true")
    return parser.parse_args(arguments)


def names(known: dict[str, Any]) -> Any:
    """Return what reads a list of known names."""

    def read(text: str) -> tuple[str, ...]:
        found = tuple(filter(None, text.split(",")))
        unknown = [name for name in found if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return found

    return read


def compiled(model: Path, recipe: str, fresh: bool) -> Contender:
    """Compile the model, unless that was done before."""
    place = ARTIFACTS / f"{model.name}-{recipe}.qc"
    if fresh or not place.exists():
        say(f"compiling {model} as {recipe} ...")
        qc.compile(model, f"cpu-{recipe}", output=place)
    stored = tuple(place / name for name in ("weights.safetensors", "model.so", "manifest.json"))
    return Contender(f"qc {recipe}", Path(sys.executable), "qc", place, stored)


def say(text: str) -> None:
    """Show progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
