"""What each key counts for in the one sum of a row of scores: a table of weights in which equal errors of neighbours do not cancel.

    w_t = ±(0.5 … 1.5), of period 256        Σ_t w_t s_it  =  q_i · Σ_t w_t k_t

A flash kernel has registers for one sum per row. With signs ±1 two equal errors cancel half of the time, eight neighbours about once in
four. These weights were searched for, so that every pattern below leaves something (tests/test_keyweights.py goes through all of them):

    any run of up to 768 neighbouring keys, from wherever to wherever                     1/64, and 1/16 if it lies within a period
    aligned runs of 2, 4 … 128                                                            1/4
    of 32 keys, or of an aligned 64: every 2nd, 4th, 8th, 16th or 32nd from any on, or the
    columns of one thread of a matrix unit's accumulator, {2l, 2l + 1} + 8j                1/4
    the same of any number of consecutive blocks of 32 within a period                    1/16
    a pair of equal, or of equal and opposite errors, 1, 2, 4, 8, 16 or 32 apart          1/64

They are multiples of 1/64 with at most seven digits: their products with half-precision numbers are exact in fp32, like those of signs.
"""

from __future__ import annotations

import numpy as np

#: Keys after which the weights repeat; blocks and pages divide it, or are multiples.
PERIOD = 256
#: Of any weight, and of all: what bounds grow by (threshold.py).
LARGEST, RMS = 1.5, 1.05

#: In units of 1/64. All but the last are multiples of 4, and their sums from the first on are different numbers; the last closes the
#: period 17 above zero, so that runs into the next do not cancel either.
_TABLE = """
    56 32 84 -52 -88 -92 44 96 -36 64 76 32 -92 52 -64 -48 68 76 32 88 60 48 68 36 -72 88 60 48 -96 36 84 68
    -76 92 -52 80 -56 40 96 56 -68 32 80 64 72 -92 -36 -76 96 88 92 60 -80 36 32 40 92 44 36 -92 -32 60 -40 -52
    72 64 84 56 -64 -72 88 -48 60 96 52 -68 -84 -44 -60 -88 40 68 48 64 32 88 84 -60 36 56 68 -36 40 -84 76 -48
    -96 -44 40 -72 -84 40 92 68 -88 -60 -32 -56 -96 -68 -44 -96 32 -52 68 -84 56 -72 64 -92 40 84 48 -64 -92 -56 -52 -36
    -80 -32 72 88 -52 -48 80 44 -60 -56 -40 -84 68 -88 -48 -32 96 -44 76 -56 -48 84 44 80 -84 -60 72 -44 -88 -96 84 -56
    36 72 -96 -64 -92 32 56 84 -68 -80 -44 -32 36 -92 68 52 -76 -36 64 -84 -32 56 -72 92 -64 -76 -32 64 -56 -44 -36 88
    -92 32 -68 52 -40 80 64 68 -36 -48 -76 60 -52 -68 -96 56 -72 96 -40 -80 -92 -40 32 52 -48 -60 -36 -96 -64 -52 72 64
    -60 80 -92 36 80 96 48 56 92 -36 -64 -80 -76 -48 -56 92 96 -44 -80 -84 -56 72 76 -32 84 -48 -56 40 -32 88 40 93
"""


def of_keys(count: int) -> np.ndarray:
    """w of the first ``count`` keys, float32."""
    table = np.array(_TABLE.split(), np.float32) / 64
    return np.resize(table, count)
