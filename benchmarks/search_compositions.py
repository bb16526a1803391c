"""Search compositions of passes for the least perplexity at so many stored bits.

    python -m benchmarks.search_compositions MODEL --bits 3 --most-bits 3.5 --device cuda

It starts from one composition of benchmarks.compositions and changes one thing at a time. The
changes that helped are then added up, the best first, on each of the best formats; and each sum is
tried without each of its parts. The text that decides is what follows the calibration windows in
the calibration text: the evaluation text is looked at once, by whoever reports a figure.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.campaign import Job, add_bench, open_bench, read_results, run_all
from benchmarks.compositions import CHANGES, FORMATS, STARTS

MOST_BITS = {4: 5.0, 3: 3.5, 2: 2.6}
"""Stored bits of a weight that a composition may take, by the bits of its codes."""

BEST_FORMATS = 3
"""Formats, beside that of the start, on which the changes that helped are tried."""

NEARLY = 0.9
"""Part of the start's perplexity that a format may cost alone: others may help it more."""

Results = Mapping[str, Mapping[str, Any]]


def name_of(bits: int, changes: Sequence[str]) -> str:
    """Name a composition by what it changes."""
    return f"{bits} {' + '.join(changes) or 'start'}"


def job_of(bits: int, changes: Sequence[str]) -> Job:
    """Return the composition with some changes, to be measured with the first seed."""
    known = {**CHANGES, **FORMATS[bits]}
    found = STARTS[bits].with_changes([known[each] for each in changes])
    return Job(name_of(bits, changes), found.passes)


def first_round(bits: int) -> list[Job]:
    """Return the start, and every change of it alone."""
    return [job_of(bits, ()), *(job_of(bits, (each,)) for each in (*CHANGES, *FORMATS[bits]))]


def gains(results: Results, bits: int, most: float) -> dict[str, float]:
    """Return what each change alone divides the deciding perplexity by, those above `most` stored
    bits left out; the best first."""
    start = results[name_of(bits, ())]["deciding"]
    found = {
        change: start / results[name]["deciding"]
        for change in (*CHANGES, *FORMATS[bits])
        if (name := name_of(bits, (change,))) in results and results[name]["bits"]["blocks"] <= most
    }
    return dict(sorted(found.items(), key=lambda each: -each[1]))


def second_round(results: Results, bits: int, most: float) -> list[Job]:
    """Return sums of the changes that helped, on the start and on the best formats."""
    known = gains(results, bits, most)
    helped: list[str] = []
    for change, gain in known.items():
        same = any(CHANGES[change].keys() == CHANGES[other].keys() for other in helped
                   if change in CHANGES)  # fmt: skip
        if change in CHANGES and gain > 1 and not same:
            helped.append(change)
    formats = [each for each, gain in known.items() if each in FORMATS[bits] and gain > NEARLY]
    found: dict[str, Job] = {}
    for base in ((), *((each,) for each in formats[:BEST_FORMATS])):
        for number in range(1, len(helped) + 1):
            sums = [helped[:number], helped[: number - 1] + helped[number:]]
            for changes in sums:
                job = job_of(bits, (*base, *changes))
                found.setdefault(job.name, job)
    return [job for name, job in found.items() if name not in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_bench(parser, "compositions")
    parser.add_argument("--bits", type=int, default=3, choices=STARTS, help="of a code")
    parser.add_argument("--most-bits", type=float, help="stored a weight")
    parser.add_argument("--list", action="store_true", help="only name the first candidates")
    options = parser.parse_args()
    bits, most = options.bits, options.most_bits or MOST_BITS[options.bits]
    if options.list:
        print("\n".join(job.name for job in first_round(bits)))
        return
    bench = open_bench(options.model, options.device)
    run_all(bench, first_round(bits), options.output, options.workers)
    known = {each["name"]: each for each in read_results(options.output)}
    run_all(bench, second_round(known, bits, most), options.output, options.workers)
    mine = [r for r in read_results(options.output) if r["name"].startswith(f"{bits} ")]
    for each in sorted(mine, key=lambda r: r["deciding"]):
        stored = each["bits"]["blocks"]
        fits = "" if stored <= most else "  more bits than asked for"
        print(f"{each['deciding']:8.3f}  {stored:.3f} bits  {each['name']}{fits}")


if __name__ == "__main__":
    main()
