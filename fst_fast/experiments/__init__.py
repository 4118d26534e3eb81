"""Experiments on the paper's claims and on questions others asked: `python -m fst_fast.experiments NAME`."""
