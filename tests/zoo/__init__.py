"""The zoo: tiny random models of every family of decoders that transformers has in some number, and what labkit does with
each: ``families`` makes them, ``cells`` checks one technique on one of them, ``table`` writes docs/families.md."""
