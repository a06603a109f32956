"""Write docs/benchmarks.md from the rows in benchmarks/results: `python -P benchmarks/report.py [--check]`.

Of every case the newest row counts. With --check nothing is written and the exit status says whether the page is the
one that the rows give.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = PROJECT / "benchmarks" / "results"
PAGE = PROJECT / "docs" / "benchmarks.md"
# What each kernel is measured by, on one H200 in fp16, with SD1.5 unless named.
TARGETS = {
    "spectral_reassemble": "Every weight of a UNet rebuilt from shifted singular values. Target: at most 3.5 ms.",
    "lowrank_merge": "Rank 16 merged into all attention weights. Target: at most 0.15 ms.",
    "lowrank_residual": "Every sample's own low-rank branch on all attention projections, UNet batch 16. "
    "Target: at most 4 % of the UNet step (34.4 ms dense and compiled).",
    "lowrank_linear": "The same, in one product with the dense layer; the cost is the whole, branches and dense "
    "layers, over the dense layers alone, and what it takes beyond them as a share of the step: the target is that of "
    "lowrank_residual. Baseline: the dense product, then lowrank_residual.",
    "factored_linear": "All linear layers with per-sample singular values, batch 16. "
    "Target, with factored_conv: at most 15 % over the dense UNet, both compiled.",
    "factored_conv": "All convolutions with per-sample singular values, batch 16. The dense ones leave their biases to "
    "what follows, but for products on pixels.",
    "slot_linear": "The linear layers on large pictures with each sample's own weight, batch 16 with 8 adapters; `over "
    "dense` is against one weight for everybody.",
    "group_norm": "All norms before convolutions and transformers, with SiLU and time embedding, batch 16, against "
    "torch's with its two changes of layout.",
    "layer_norm": "All norms of transformers with each sample's own weights, batch 16. No target but the bytes.",
    "gated_gelu": "All GEGLUs, batch 16. No target but the bytes.",
    "residual_add": "All sums at the ends of resnets, transformers and their blocks, batch 16, with the bias of a "
    "convolution before them. No target but the bytes.",
    "sampler_step": "Guidance and sampler update in one pass. Target: within 1.3 times of a device copy.",
    "attention": "All attentions of one kind and head size in a pass of the UNet, batch 16, by backend: what "
    "`engine.attention` is chosen by. No target.",
    "lag_mask": "Attention masks of all cross-attention blocks, 8 samples.",
    "shared_training": "Whole steps of svdiff jobs, in bfloat16: one against making every weight in every step, then "
    "several that share their steps against one at a time; launched kernel by kernel, then (-graph) as one CUDA graph. "
    "`Plain` is one at a time, launched kernel by kernel. No rows are anchored to the base, which would add its "
    "forward pass for one row in eight. Targets: twice as fast; 8 jobs, three times the jobs per hour.",
    "compiled_training": "The same with graphs of torch.compile's kernels, one picture a step; W in every step is a "
    "CUDA graph of torch's. The same targets.",
    "export_large": "Writing the dense graph of a whole UNet beyond 2 GiB, one weight at a time; then onnx.checker and "
    "TensorRT's parser read it. No target.",
    "unet_step": "One captured call of the engine by plan, UNet batch and way of compiling, SD1.5 at 512 px, SDXL at "
    "1024. Target: SD1.5's compiled dense step at batch 2 at most 7.3 ms.",
    "unet_profile": "Where one such call's time goes, as shares; `next gain` is the largest beside matrix products and "
    "convolutions.",
    "tensorrt_step": "One call of the TensorRT engine by plan and UNet batch, copies in and out included, SD1.5 at 512 "
    "px; `refit` is a swap of the merged plan. No target: docs/tensorrt.md says what is known.",
    "attach": "From a request to a row that a step can read, by the tier the adapter is found in. "
    "Target: `slot` at most 1 ms, `rows` and `host` at most 5 ms.",
    "serve_mixed": "25 steps, 512 px, guidance on; tenants ask for the next picture when they have the last, and draw "
    "adapters by Zipf's law. Ratios of images per second: to diffusers with load, fuse and unfuse per request (a), "
    "to diffusers with peft's hot swap (b), to this engine with one user at a time (c). Target with 8 tenants: 8 times "
    "(a), 1.4 times (c). The overhead is the step loop's time over its calls', less 1; target: at most 0.05.",
}
# Pictures, not timings: docs/methods.md is theirs.
OWN_PAGES = ("methods_cpu",)
# Benchmarks whose rows are not times of one call: their fields and headings.
COLUMNS: dict[str, dict[str, str]] = {
    "unet_profile": {
        "ms": "ms",
        "gemm": "products",
        "convolution": "convolution",
        "attention": "attention",
        "elementwise": "elementwise",
        "other": "other",
        "gaps": "gaps",
        "next_gain": "next gain",
    },
    "serve_mixed": {
        "images_per_s": "images/s",
        "p50_s": "p50 s",
        "p99_s": "p99 s",
        "ratio_a_fuse": "to (a)",
        "ratio_b_hotswap": "to (b)",
        "ratio_c_swap_per_user": "to (c)",
        "bare_images_per_s": "images/s of the bare loop",
        "overhead": "overhead of the loop",
    },
}
INTRODUCTION = """# Benchmarks

Generated by `python -P benchmarks/report.py` from the rows in `benchmarks/results/`; do not edit. `make bench-gpu`
measures the kernels and the engine on a GPU, `make bench` the service on a CPU.

Times are medians of one call with the 20th and 80th percentile. A kernel and its baseline each run in one CUDA graph,
and a result that is wrong against float64 is not timed. Weights come from memory: all layers of a model follow each
other, and small calls rotate among sets of data that together are several times the 50 MB of L2. Activations of one
shape share their memory, as in a UNet, so small ones come from L2. The ratio is baseline over kernel: above 1 the
kernel is faster. The floor is what the operations at 790 TFLOP/s or the bytes at 4.3 TB/s take, the ceilings seen on
an H200.
"""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the newest row of each case, in the order in which cases first appear."""
    newest: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            row = json.loads(line)
            newest[str(row["case"])] = row
    return list(newest.values())


def show(value: Any) -> str:
    """Format one cell: four significant digits, a dash for what a row has not got."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def cost(row: dict[str, Any]) -> str:
    """Format what a row costs in its surroundings, where it says so."""
    parts = []
    if "over_dense" in row:
        parts.append(f"{row['over_dense']:+.1%} over the layers dense")
    if "share_of_step" in row:
        parts.append(f"{row['share_of_step']:.1%} of the UNet step")
    if "jobs_per_hour" in row:
        parts.append(f"{row['jobs_per_hour']:.4g} jobs an hour; {row['baseline']}: {row['baseline_jobs_per_hour']:.4g}")
    if "plain_jobs_per_hour" in row:
        parts.append(f"plain: {row['plain_jobs_per_hour']:.4g}")
    return ", ".join(parts) or "–"


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the Markdown lines of one benchmark's table."""
    lines = [
        "| case | batch | ms (20–80 %) | baseline | ratio | floor ms | TFLOP/s | GB/s | cost | where and when |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            show(row["case"]),
            show(row.get("batch")),
            f"{show(row.get('ms'))} ({show(row.get('p20'))}–{show(row.get('p80'))})",
            f"{show(row.get('baseline'))}: {show(row.get('baseline_ms'))} ms",
            show(row.get("ratio")),
            show(row.get("floor_ms")),
            show(row.get("tflops")),
            show(row.get("gbs")),
            cost(row),
            where(row),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def own_table(rows: Sequence[dict[str, Any]], columns: Mapping[str, str]) -> list[str]:
    """Return the Markdown lines of a table with columns of its own: heading by field."""
    lines = [f"| case | {' | '.join(columns.values())} | where and when |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        cells = [show(row["case"]), *(show(row.get(field)) for field in columns), where(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def where(row: dict[str, Any]) -> str:
    """Format hardware, versions, date and commit."""
    versions = ", ".join(f"{name} {version}" for name, version in dict(row.get("versions") or {}).items())
    return f"{show(row.get('hardware'))}; {versions}; {show(row.get('date'))}, {show(row.get('commit'))}"


def render(results: Path) -> str:
    """Return the page."""
    parts = [INTRODUCTION]
    others = sorted(path.stem for path in results.glob("*.jsonl") if path.stem not in (*TARGETS, *OWN_PAGES))
    for stem in (*TARGETS, *others):
        parts.append(f"## {stem}\n")
        if stem in TARGETS:
            parts.append(f"{TARGETS[stem]}\n")
        path = results / f"{stem}.jsonl"
        rows = read_rows(path) if path.is_file() else []
        lines = own_table(rows, COLUMNS[stem]) if stem in COLUMNS else table(rows)
        parts.append("\n".join(lines) + "\n" if rows else "Not yet measured.\n")
    return "\n".join(parts)


def main(arguments: Sequence[str]) -> int:
    """Write the page, or compare it."""
    page = render(RESULTS)
    if "--check" in arguments:
        same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page
        print("docs/benchmarks.md is up to date" if same else "docs/benchmarks.md is old: run benchmarks/report.py")
        return 0 if same else 1
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
