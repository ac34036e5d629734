"""Finding main loops in machine code, on a kernel small enough to read."""

from __future__ import annotations

import pytest

from bench import sass

#: Two loops over tiles as the checked product has them: a K loop with a barrier whose waiting is laid out behind the end, an
#: epilogue, a loop without matrix instructions, and a second kind of tile that leaves by EXIT and goes on by a plain jump.
KERNEL = """
	code for sm_90a
		Function : checked_product
        /*0000*/                   MOV R1, c[0x0][0x28] ;                         /* 0x0000000000000000 */
                                                                                  /* 0x000fe20000000f00 */
        /*0010*/               @P0 BRA 0x100 ;                                    /* 0x1 */
        /*0020*/                   UTMALDG.2D [UR8], [UR14] ;                     /* 0x1, tiles begin */
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR20], R102 ;
        /*0040*/              @!P1 BRA 0x1a0 ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24 ;
        /*0060*/              @!P2 UTMALDG.2D [UR8], [UR14] ;
        /*0070*/                   FMUL R3, R3, R4 ;
        /*0080*/              @!P1 BRA 0x30 ;
        /*0090*/                   FADD R5, R5, R6 ;
        /*00a0*/                   FFMA R5, R5, R6, R7 ;
        /*00b0*/                   SHFL.BFLY PT, R0, R5, 0x1, 0x1f ;
        /*00c0*/              @!P3 BRA 0xb0 ;
        /*00d0*/                   MUFU.RSQ R8, R5 ;
        /*00e0*/              @!P1 BRA 0x20 ;
        /*00f0*/                   FADD.FTZ R5, R5, R6 ;
        /*0100*/                   UMOV UR4, 0x3f ;
        /*0110*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], R24, gsb0 ;
        /*0120*/                   BRA.U !UP0, 0x110 ;
        /*0130*/                   FADD R5, R5, R6 ;
        /*0140*/                   STG.E.128 desc[UR4][R4.64], R8 ;
        /*0150*/               @P1 EXIT ;
        /*0160*/                   BRA 0x100 ;
        /*0170*/                   STL [R1], R4 ;
        /*0180*/                   NOP;
        /*0190*/                   BRA 0x190;
        /*01a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR20], R102 ;
        /*01b0*/              @!P1 BRA 0x1a0 ;
        /*01c0*/                   BRA 0x50 ;
"""


@pytest.fixture(scope="module")
def code():
    return sass.read(KERNEL)


def addresses(code, indices):
    return [code.instructions[i].address for i in sorted(indices)]


def test_every_instruction_is_read(code):
    assert addresses(code, range(len(code.instructions))) == list(range(0, 0x1D0, 0x10))
    guarded = code.instructions[6]
    assert (guarded.guard, guarded.mnemonic, guarded.name) == ("!P2", "UTMALDG.2D", "UTMALDG")
    assert code.instructions[25].text == "BRA 0x190" and code.instructions[25].target == 0x190


def test_main_loops_are_the_innermost_with_matrix_instructions_and_wait_where_they_wait(code):
    data, check = code.main_loops
    waiting = [0x1A0, 0x1B0, 0x1C0]
    assert addresses(code, data) == [0x30, 0x40, 0x50, 0x60, 0x70, 0x80, *waiting]
    assert addresses(code, check) == [0x110, 0x120]


def test_waiting_behind_the_end_makes_no_loop_of_what_lies_between(code):
    """0x1c0 jumps back to 0x50, but 0x1c0 is reached without passing 0x50 first."""
    assert sorted(addresses(code, loop)[0] for loop in code.loops) == [0x20, 0x30, 0xB0, 0x100, 0x110, 0x1A0]


def test_around_a_main_loop_stands_the_rest_of_its_tile(code):
    data, check = code.main_loops
    assert addresses(code, code.around(data)) == [0x20, *range(0x90, 0xF0, 0x10)]
    assert addresses(code, code.around(check)) == [0x100, 0x130, 0x140, 0x150, 0x160]


def test_arithmetic_is_split_into_main_loops_and_the_rest(code):
    inside = frozenset().union(*code.main_loops)
    outside = frozenset(range(len(code.instructions))) - inside
    assert code.count(sass.ARITHMETIC, inside) == {"FMUL": 1}
    assert code.count(sass.ARITHMETIC, outside) == {"FADD": 3, "FFMA": 1, "MUFU": 1}
    assert code.count(sass.LOADS, inside) == code.count(sass.LOADS, outside) == {"UTMALDG": 1}
    assert code.count(sass.SPILLS) == {"STL": 1}
    assert code.matrix() == {"HGMMA.64x128x16.F32.BF16": 1, "HGMMA.64x64x16.F32.BF16": 1}
    assert code.issued(range(24, 26)) == 1  # NOP and a jump


def test_without_matrix_instructions_the_multiplying_loop_is_the_main_one():
    plain = "\n".join(line for line in KERNEL.splitlines() if "HGMMA" not in line).replace("FMUL R3, R3, R4", "FFMA R3, R3, R4, R3")
    code = sass.read(plain)
    (main,) = code.main_loops
    assert {0x30, 0x70, 0x80} <= set(addresses(code, main)) and 0xA0 not in addresses(code, main)


def test_code_without_loops_has_no_main_loop():
    code = sass.read("/*0000*/ HMMA.16816.F32 R0, R4, R8, R0 ;\n/*0010*/ EXIT ;\n/*0020*/ BRA 0x20;")
    assert code.main_loops == () and code.matrix() == {"HMMA.16816.F32": 1}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("HGMMA.64x128x16.F32.BF16", "HGMMA.64x64x16.F32.BF16", True),
        ("HGMMA.64x128x16.F32.BF16", "HGMMA.64x128x8.F32.TF32", False),
        ("HGMMA.64x64x16.F32.BF16", "HGMMA.64x64x16.F32", False),
        ("HMMA.16816.F32.BF16", "HMMA.1688.F32.BF16", False),
        ("HGMMA.64x64x16.F32", "HMMA.16816.F32", False),
        ("UTCHMMA", "UTCHMMA", True),
    ],
)
def test_matrix_instructions_agree_in_all_but_n(one, other, same):
    assert (sass.arithmetic_of(one) == sass.arithmetic_of(other)) is same
