"""Replaces rates of fst_fast/rates.json, which `train --plan` computes with, by measured ones.

    python benchmarks/rates.py RESULT.json [RESULT.json ...]

Reads what kernels.py (bandwidth of a copy) and cost.py --shape (MFU of learning, the embedded engine's seconds a layer)
wrote on a GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fst_fast.rates import MEASURED, TABLE, Hardware, kind_of, read_table
from fst_fast.shape import BUILT_IN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--table", type=Path, default=TABLE, help=argparse.SUPPRESS)
    args = parser.parse_args()
    table = json.loads(args.table.read_text())
    for path in args.results:
        result = json.loads(path.read_text())
        kind = kind_of((result.get("gpu") or {}).get("name", ""))
        if not kind:
            parser.error(f"{path}: its GPU, {result.get('gpu')}, is not in the table")
        for name, value, how in found(result, read_table(args.table)[kind]):
            source = f"{MEASURED} at commit {result['commit']}: {how}"
            print(f"{kind} {name}: {table[kind][name]['value']:g} -> {value:.4g} ({source})")
            table[kind][name] = {"value": float(f"{value:.4g}"), "source": source}
    write(table, args.table)


def found(result: Mapping[str, Any], hardware: Hardware) -> Iterator[tuple[str, float, str]]:
    """(rate, value, command) of one result file."""
    if "copy_bytes_per_s" in result:
        reached = result["copy_bytes_per_s"] / 1e12 / hardware["bandwidth_tbs"]
        yield "bandwidth_reached", reached, "benchmarks/kernels.py"
    elif result.get("shape") and (run := result["results"].get("fst")):
        how = f"benchmarks/cost.py --shape {result['shape']}"
        if run["mfu"]:
            yield "train_mfu", run["mfu"], how
        rl = result["results"].get("rl")
        if rl and rl["engine"] == "torch":  # one batch of the engine a step: as many iterations as a response is long
            iterations = rl["max_new_tokens"] * result["steps"]
            layer = rl["phases"]["rollout"] / iterations / BUILT_IN[result["shape"]]["num_hidden_layers"]
            yield "torch_layer_us", 1e6 * layer, how


def write(table: Mapping[str, Any], path: Path) -> None:
    """One line a rate."""
    kinds = [
        f' "{kind}": {{\n' + ",\n".join(f'  "{name}": {json.dumps(rate)}' for name, rate in rates.items()) + "\n }"
        for kind, rates in table.items()
    ]
    path.write_text("{\n" + ",\n".join(kinds) + "\n}\n")


if __name__ == "__main__":
    main()
