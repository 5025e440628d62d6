"""What is read of a disassembly, on a listing made by hand."""

import pytest
from support.triton_mode import interpreted

if not interpreted:
    pytest.skip("needs Triton", allow_module_level=True)

from clear_dit.kernels.triton.disassembly import loop_spills, loops

LISTING = """
.text.kernel:
        /*0000*/                   STL [R1], R2 ;
.L_x_0:
        /*0010*/                   LDL R2, [R1] ;
.L_x_1:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0050*/              @!P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/                   FFMA R1, R2, R3, R4 ;
        /*0070*/             @!UP1 UTMALDG.4D [UR8], [UR4], desc[UR6] ;
        /*0080*/                   STL.64 [R1], R2 ;
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/               @P1 BRA `(.L_x_1) ;
        /*00b0*/               @P2 BRA `(.L_x_0) ;
        /*00c0*/               @P3 EXIT ;
        /*00d0*/                   EXIT ;
.L_x_3:
        /*00e0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR12], R20 ;
        /*00f0*/              @!P0 BRA `(.L_x_3) ;
        /*0100*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*0110*/                   BRA `(.L_x_4) ;
"""


def test_only_the_innermost_loop_that_computes_is_one():
    (loop,) = loops(LISTING)
    assert loop.instructions == 9
    assert sum(loop.classes.values()) == loop.instructions
    assert {name: count for name, count in loop.classes.items() if count} == {
        "tensor": 3, "ffma": 1, "bar": 1, "utmaldg": 1, "local": 1, "other": 2,
    }  # fmt: skip
    assert loop.products == {"64x64x16": 2, "16x8x16": 1}


def test_spills_of_outer_loops_count_too():
    assert loop_spills(LISTING) == 2
