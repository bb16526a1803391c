"""The `qc` command: check, compile, build, explain, run, eval, verify, inspect."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qc.errors import InputError, QcError, nearest
from qc.runtime.tables import format_table

if TYPE_CHECKING:
    from qc.evaluation import Logits
    from qc.runtime import Artifact
    from qc.runtime.explanation import Explanation

STAGES = ("captured", "canonical", "quantized", "planned", "log")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        return options.command(options) or 0
    except QcError as error:
        print(f"qc: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("qc: interrupted; nothing was left half-written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except OSError as error:  # a full disk, a folder without permission
        named = f"{error.filename}: " if error.filename else ""
        print(f"qc: {named}{error.strerror or error}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """Describe the commands and their options."""
    parser = argparse.ArgumentParser(prog="qc", description="Compile quantized neural networks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("check", help="what compiling would give and take")
    add_what_to_compile(one)
    add_cache(one)
    one.add_argument("--json", action="store_true", help="print the report as JSON")
    one.add_argument("--quiet", action="store_true", help="no progress")
    one.set_defaults(command=check_command)

    one = commands.add_parser("compile", help="compile a model for a target")
    add_what_to_compile(one)
    add_cache(one)
    one.add_argument("-o", "--output", required=True, metavar="DIR", help="the artifact to write")
    add_calibration(one)
    one.add_argument(
        "--explain", action="store_true", help="measure where the loss comes from, for qc explain"
    )
    one.add_argument("--quiet", action="store_true", help="no progress, no table")
    one.set_defaults(command=compile_command)

    one = commands.add_parser(
        "build", help="make a package for a device: no Python, no compiler there"
    )
    add_what_to_compile(one, "what compile takes, or an artifact of a torch target")
    one.add_argument("-o", "--output", required=True, metavar="DIR", help="the folder to write")
    add_dtype(one)
    add_calibration(one)
    one.add_argument("--quiet", action="store_true", help="no progress, no table")
    one.set_defaults(command=build_command)

    one = commands.add_parser("explain", help="where the loss comes from, by layer and by pass")
    add_what_to_compile(one, "an artifact compiled with --explain, or a model to quantize")
    add_calibration(one)
    one.add_argument("--json", action="store_true", help="print the figures as JSON")
    one.add_argument("--html", metavar="FILE", help="write one page with plots")
    one.add_argument("--all", action="store_true", help="every layer, not the worst 30")
    one.add_argument(
        "--divergence-tokens", type=int, default=128, metavar="N",
        help="tokens on which each layer's KL is measured; 0: not at all (default: 128)",
    )  # fmt: skip
    one.add_argument("--quiet", action="store_true", help="no progress")
    one.set_defaults(command=explain_command)

    one = commands.add_parser("run", help="continue a prompt, streaming the text")
    one.add_argument("artifact", metavar="DIR")
    one.add_argument("prompt")
    one.add_argument("--chat", action="store_true", help="apply the model's chat template")
    one.add_argument("-n", "--max-new-tokens", type=int, default=128)
    one.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest")
    one.add_argument("--top-k", type=int)
    one.add_argument("--top-p", type=float)
    one.add_argument("--seed", type=int)
    one.add_argument("--threads", type=int, help="default: one for each CPU of this process")
    one.add_argument("--stats", action="store_true", help="print times to standard error")
    one.set_defaults(command=run_command)

    one = commands.add_parser("eval", help="perplexity and KL divergence against the original")
    one.add_argument("artifact", metavar="DIR")
    one.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text")
    one.add_argument("--reference", metavar="MODEL", help="default: what the artifact was made of")
    one.add_argument("--no-reference", action="store_true", help="perplexity only")
    one.add_argument("--window", type=int, default=512, help="tokens per window (default: 512)")
    one.add_argument("--windows", type=int, default=64, help="at most so many (default: 64)")
    one.add_argument("--quiet", action="store_true", help="no progress")
    one.set_defaults(command=eval_command)

    one = commands.add_parser("verify", help="run every kernel of a GPU artifact on known inputs")
    one.add_argument("artifact", metavar="DIR")
    one.add_argument("--json", action="store_true", help="print the checks as JSON")
    one.set_defaults(command=verify_command)

    one = commands.add_parser("inspect", help="the report, the plan, a stage's IR, a kernel")
    one.add_argument("artifact", metavar="DIR")
    one.add_argument("--ir", metavar="STAGE", help=", ".join(STAGES))
    one.add_argument("--source", metavar="KERNEL", help="the generated code of one kernel")
    one.add_argument("--plan", action="store_true", help="the steps of a call")
    one.add_argument("--profile", action="store_true", help="milliseconds a token, by kernel")
    one.set_defaults(command=inspect_command)
    return parser


MODEL = "a Hugging Face folder or name, or a .gguf file"


def add_what_to_compile(parser: argparse.ArgumentParser, model: str = MODEL) -> None:
    """Add what `check`, `compile`, `build` and `explain` ask for alike."""
    parser.add_argument("model", help=model)
    parser.add_argument("--target", default="cpu-w4", help="machine and recipe (default: cpu-w4)")
    parser.add_argument("--recipe", help="another recipe than the target names")
    parser.add_argument(
        "--weights", metavar="FORMAT",
        help="another format for the linears: int3:g64+rank16+sparse0.5%%",
    )  # fmt: skip
    parser.add_argument("--bits", type=int, metavar="B", help="of a code, in place of the recipe's")
    parser.add_argument("--group-size", type=int, metavar="G", help="inputs that share a scale")


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Add how keys and values are kept."""
    parser.add_argument(
        "--cache",
        help="keys and values: f32, f16; on GPUs bf16, int8, e4m3 (default: the recipe's)",
    )
    add_dtype(parser)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add what GPUs compute in."""
    parser.add_argument("--dtype", help="what a GPU computes in: f16 (default) or bf16")


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Add what recipes that look at data ask for."""
    parser.add_argument(
        "--calibration", metavar="FILE",
        help=".txt or .jsonl, or self: text that the model writes (the default of recipes that "
        "look at data)",
    )  # fmt: skip
    parser.add_argument(
        "--num-calibration-samples", type=int, metavar="N", help="default: 128, of self 32"
    )
    parser.add_argument("--max-seq-length", type=int, default=512, metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of the text that the model writes")
    parser.add_argument(
        "--device", default="cpu", help="where the model is calibrated: cpu (default), cuda, auto"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with a compilation that was killed"
    )


def calibration_data(options: argparse.Namespace) -> Any:
    """Return what --calibration names: "self", or a file, which must be there; None for nothing."""
    if options.calibration in (None, "self"):
        return options.calibration
    return Path(options.calibration)


def check_command(options: argparse.Namespace) -> int:
    """`qc check MODEL --target T`"""
    from qc.compiler import check

    report = check(
        options.model, options.target, recipe=options.recipe, weights=options.weights,
        bits=options.bits, group_size=options.group_size, cache=options.cache,
        dtype=options.dtype,
        progress=not options.quiet,
    )  # fmt: skip
    print(json.dumps(report.to_dict(), ensure_ascii=False) if options.json else report)
    return 0 if report.accepted else 1


def compile_command(options: argparse.Namespace) -> None:
    """`qc compile MODEL --target T -o DIR`"""
    start = time.perf_counter()
    from qc.compiler import compile  # seconds of imports, which the user waits for too

    artifact = compile(
        options.model, options.target, recipe=options.recipe, weights=options.weights,
        bits=options.bits, group_size=options.group_size, cache=options.cache,
        dtype=options.dtype,
        calibration=calibration_data(options),
        num_calibration_samples=options.num_calibration_samples,
        max_seq_length=options.max_seq_length, seed=options.seed, device=options.device,
        resume=options.resume,
        explain=options.explain, output=options.output, progress=not options.quiet,
    )  # fmt: skip
    if options.quiet:
        return
    print(artifact.report())
    size = sum(entry.bytes for entry in artifact.manifest.files.values())
    seconds = time.perf_counter() - start
    print(f"\n{options.output}: {size / 1e6:.1f} MB, compiled in {seconds:.1f} s")


def build_command(options: argparse.Namespace) -> None:
    """`qc build MODEL --target T -o DIR`"""
    from qc.compiler import build

    made = build(
        options.model, options.target, options.output, recipe=options.recipe,
        weights=options.weights, bits=options.bits, group_size=options.group_size,
        dtype=options.dtype, calibration=calibration_data(options),
        num_calibration_samples=options.num_calibration_samples,
        max_seq_length=options.max_seq_length, seed=options.seed, device=options.device,
        resume=options.resume, progress=not options.quiet,
    )  # fmt: skip
    if options.quiet:
        return
    memory = made["memory"]
    rows = [{"file": name, "bytes": entry["bytes"]} for name, entry in made["files"].items()]
    print(format_table(rows))
    print(
        f"\n{options.output}: for {made['target']['name']}. A session needs "
        f"{memory['prefill'] / 1e6:.1f} MB, {memory['thread'] / 1e6:.1f} MB a thread, and "
        f"{memory['state_of_1024_tokens'] / 1e6:.1f} MB for each 1024 tokens of its context"
    )


def explain_command(options: argparse.Namespace) -> None:
    """`qc explain DIR` or `qc explain MODEL --target T`"""
    from qc.explaining.page import explanation_page
    from qc.explaining.terminal import show

    found = explanation_of(options)
    if options.html:
        Path(options.html).write_text(explanation_page(found), encoding="utf-8")
    if options.json:
        print(json.dumps(found.to_dict(), ensure_ascii=False))
    else:
        show(found, limit=None if options.all else 30)


def explanation_of(options: argparse.Namespace) -> Explanation:
    """Read the explanation of an artifact, or measure that of a model."""
    from qc.loading import load
    from qc.runtime.manifest import MANIFEST

    if (Path(options.model) / MANIFEST).is_file():
        return load(options.model).explain()
    from qc.compiler import explain
    from qc.explaining.explain import ExplainOptions

    return explain(
        options.model, options.target, recipe=options.recipe, weights=options.weights,
        bits=options.bits, group_size=options.group_size, calibration=calibration_data(options),
        num_calibration_samples=options.num_calibration_samples,
        max_seq_length=options.max_seq_length, seed=options.seed, device=options.device,
        options=ExplainOptions(divergence_tokens=options.divergence_tokens),
        progress=not options.quiet,
    )  # fmt: skip


def run_command(options: argparse.Namespace) -> None:
    """`qc run DIR "prompt"`"""
    from qc.loading import load

    start = time.perf_counter()
    artifact = load(options.artifact)
    if options.threads is not None:
        artifact.set_threads(options.threads)
    pieces = artifact.stream_text(
        options.prompt, options.max_new_tokens, chat=options.chat, temperature=options.temperature,
        top_k=options.top_k, top_p=options.top_p, seed=options.seed,
    )  # fmt: skip
    first = None
    for piece in pieces:
        first = first or time.perf_counter()
        print(piece, end="", flush=True)
    print()
    if options.stats and first is not None:
        total = time.perf_counter() - first
        print(f"first text after {first - start:.2f} s, the rest took {total:.2f} s",
              file=sys.stderr)  # fmt: skip


def eval_command(options: argparse.Namespace) -> None:
    """`qc eval DIR --text FILE`"""
    from qc.evaluation import evaluate_windows, windows_of
    from qc.loading import load
    from qc.progress import progress_bar

    text = read_text(options.text)
    artifact = load(options.artifact)
    tokens = artifact.text.encode(text, special_tokens=False)
    windows = windows_of(tokens, options.window, options.windows)
    reference = None if options.no_reference else reference_logits(artifact, options.reference)
    with nullcontext(None) if options.quiet else progress_bar() as show:

        def progress(done: int) -> None:
            if show is not None:
                show(f"window {done} of {len(windows)}", done / len(windows))

        print(evaluate_windows(artifact, windows, reference, progress))


def reference_logits(artifact: Artifact, named: str | None) -> Logits | None:
    """Return the original model as a function, from the folder or file it came from."""
    import numpy as np
    import torch

    from qc.compiler import trace

    source = named or artifact.manifest.report.get("source")
    if not source:
        print("qc: no original model to compare with; name one with --reference", file=sys.stderr)
        return None
    model = trace(source).quantize("f32")
    label = artifact.manifest.inputs[0]

    def logits(ids: Any) -> Any:
        inputs = {label: torch.from_numpy(ids)}
        return np.asarray(model(None, **inputs)["logits"])

    return logits


def read_text(path: str) -> str:
    """Read a UTF-8 file; InputError where it is missing or something else."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"cannot read {path}: {reason}") from None


def verify_command(options: argparse.Namespace) -> int:
    """`qc verify DIR`"""
    from qc.runtime import load

    found = load(options.artifact, verify=True).verify()
    print(json.dumps(found.to_dict(), ensure_ascii=False) if options.json else found)
    return 1 if found.wrong else 0


def inspect_command(options: argparse.Namespace) -> None:
    """`qc inspect DIR`"""
    from qc.loading import load

    artifact = load(options.artifact)
    if options.ir:
        if options.ir not in STAGES:
            hint = nearest(options.ir, STAGES) or f"; known are {', '.join(STAGES)}"
            raise InputError(f"unknown stage {options.ir!r}{hint}")
        print((artifact.path / "ir" / f"{options.ir}.txt").read_text())
    elif options.source:
        print(artifact.source(options.source))
    elif options.plan:
        print(artifact.plan)
    elif options.profile:
        print(artifact.profile())
    else:
        print(artifact.report())
