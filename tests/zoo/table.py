"""docs/families.md: what labkit does with each family, from the zoo's cells.

python tests/zoo/table.py              # check every family, and write the table: `make zoo`
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from zoo import cells
from zoo.families import FAMILIES

FILE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
HEAD = """# Families of models

What labkit does with decoders of each family, found out on a tiny random model of it: `make zoo` runs every technique and
writes this page, and the tests hold a part of its rows at every run. "yes" for weights: lossless at that end of the knobs in
fp32 and bf16, the same after a save and a load, right for padded batches and when generating; of a mixture's experts, which
are no linears in transformers 5, methods say that they leave them. "yes" for the cache: as
without it at the lossless end, and under a budget the model attends to what is kept. "yes" for the engine: the graph's
logits and tokens are those of the model. Elsewhere the method refuses, in the words of the notes below the table.

| family | weights | KV cache | engine | export |
|---|---|---|---|---|
"""


def plain(answer: str) -> str:
    """A refusal without what differs between techniques and families: the setting and the class that it names."""
    answer = re.sub(rf"^({'|'.join(cells.WEIGHTS | cells.CACHE)})(\([^)]*\))?", "It", answer)
    answer = re.sub(r"\b\w+(ForCausalLM|LMHeadModel|Model)\b", "the model", answer)
    return answer if answer.startswith(cells.YES) else answer[:1].upper() + answer[1:]


def line(family: str, row: dict[str, str], notes: list[str]) -> str:
    """A row of the table; refusals become numbers of notes, and of several techniques only those that stand apart are named."""

    def cell(names) -> str:
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(plain(row[name]), []).append(name)
        parts = []
        for answer in sorted(found, key=lambda a: -len(found[a])):
            said = answer
            if not answer.startswith(cells.YES):
                if answer not in notes:
                    notes.append(answer)
                said = f"no [{notes.index(answer) + 1}]"
            parts.append(f"{', '.join(found[answer])}: {said}" if parts else said)
        return "; ".join(parts)

    columns = (list(cells.WEIGHTS), list(cells.CACHE), ["engine"], ["export"])
    return f"| {family} | {' | '.join(cell(names) for names in columns)} |"


def page(rows: dict[str, dict[str, str]]) -> str:
    notes: list[str] = []
    lines = [line(family, row, notes) for family, row in rows.items()]
    numbered = [f"{i}. {note}" for i, note in enumerate(notes, 1)]
    return HEAD + "\n".join(lines) + "\n\n" + "\n".join(numbered) + "\n"


def main() -> int:
    rows = {}
    for family in FAMILIES:
        rows[family] = cells.row(family)
        wrong = {name: answer for name, answer in rows[family].items() if answer.startswith(cells.WRONG)}
        print(family, *(f"\n    {name} {answer}" for name, answer in wrong.items()), flush=True)
    faults = sum(answer.startswith(cells.WRONG) for row in rows.values() for answer in row.values())
    print(f"{len(rows)} families, {sum(map(len, rows.values()))} cells, {faults} wrong")
    if not faults:
        FILE.write_text(page(rows), encoding="utf-8")
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main())
