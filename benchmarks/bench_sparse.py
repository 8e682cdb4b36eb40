"""From which sparsity on is a sparse product faster than a dense one, and where does packed 4-bit stand beside it?"""

from report import Row

from labkit.measure import sparse_speed

TITLE = "Sparse products against dense fp32 and packed 4-bit, by the share of zeros"
TIMEOUT = 2400
SHAPES = ((576, 576), (4096, 4096), (14336, 4096))  # (out, in): this model's q, Llama-2-7B's o, Llama-3-8B's up
QUICK = (0.5, 0.9, 0.99)


def run(quick: bool) -> list[Row]:
    rows = []
    for shape in SHAPES[:1] if quick else SHAPES:
        for batch in (1, 64):
            what = f"{shape[0]}×{shape[1]}, batch {batch}"
            rounds = 5 if quick or (shape[0] > 4096 and batch > 1) else 11
            found = sparse_speed.time_against_sparsity(
                shape, batch, QUICK if quick else sparse_speed.SPARSITIES, rounds, 0.05 if quick else 0.2
            )
            for r in found:
                name = f"{what}, {100 * r.sparsity:.0f} % zeros, {r.name} ({r.bits_per_weight:.3g} bits per weight)"
                rows.append(Row(name, 1e6 * r.seconds, "µs", "dense", r.ratio))
            for name in dict.fromkeys(r.name for r in found if r.name != "dense"):
                rows.append(_crossover(what, name, sparse_speed.crossover(found, name)))
    return rows


def _crossover(what: str, name: str, sparsity: float | None) -> Row:
    if sparsity is None:
        return Row(f"{what}, {name} beats dense: never", 100, "% zeros")
    return Row(f"{what}, {name} beats dense from", 100 * sparsity, "% zeros")
