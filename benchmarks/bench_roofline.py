"""This machine's roofs, measured afresh: the bandwidth and the peaks that every other benchmark is held against."""

from report import Row

from labkit.measure import roofline

TITLE = "Read bandwidth and matmul peaks of this machine"
TIMEOUT = 300


def run(quick: bool) -> list[Row]:
    roof = roofline.measure(seconds=0.5 if quick else 3.0, refresh=True)
    rows = []
    for way, speed in sorted(roof.reads.items(), key=lambda item: -item[1]):
        rows.append(Row(f"read, {way}", speed / 1e9, "GB/s", roof.method, speed / roof.bandwidth))
    for dtype, peak in roof.peaks.items():
        base = ("fp32", peak / roof.peaks["fp32"]) if "fp32" in roof.peaks else (None, None)
        rows.append(Row(f"matmul {dtype}, {roof.sizes[dtype]}²", peak / 1e9, "GFLOP/s", *base))
    for dtype in roof.peaks:
        rows.append(Row(f"ridge {dtype}", roof.ridge(dtype), "FLOP/byte"))
    return rows
