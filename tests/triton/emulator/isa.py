"""Which operation of the machine (``machine/alu.h``) an instruction of PTX is, where it is one and no more.

What is not here, or lowered by name in ``lower.py``, is refused: nothing is skipped or guessed.
"""

from __future__ import annotations

import re

_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_FLOAT_COMPARISONS = (
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "equ",
    "neu",
    "ltu",
    "leu",
    "gtu",
    "geu",
    "num",
    "nan",
)


def _integers() -> dict[str, str]:
    table = {}
    for bits in (16, 32, 64):
        for sign in "su":
            kind = f"{sign}{bits}"
            table |= {f"{name}.{kind}": f"{name}{bits}" for name in ("add", "sub")}
            table |= {
                f"mul.lo.{kind}": f"mul{bits}",
                f"div.{kind}": f"div_{kind}",
                f"rem.{kind}": f"rem_{kind}",
            }
            table |= {f"{name}.{kind}": f"{name}_{kind}" for name in ("min", "max")}
            table |= {f"shr.{kind}": f"shr_{kind}"}
            if bits > 16:
                table |= {f"mad.lo.{kind}": f"mad{bits}", f"mul.hi.{kind}": f"mulhi_{kind}"}
                table |= {f"neg.{kind}": f"neg{bits}"}
        table |= {f"shl.b{bits}": f"shl{bits}", f"shr.b{bits}": f"shr_u{bits}", f"not.b{bits}": f"not{bits}"}
        wide = 64 if bits == 64 else 32
        table |= {f"{name}.b{bits}": f"{name}{wide}" for name in ("and", "or", "xor")}
        for kind in (f"b{bits}", f"s{bits}", f"u{bits}", f"f{bits}"):
            table[f"selp.{kind}"] = f"select{wide}"
            table[f"mov.{kind}"] = f"mov{wide}"
        for name in ("eq", "ne", "lt", "le", "gt", "ge"):
            plain = name in ("eq", "ne")
            if bits > 16:
                table |= {f"setp.{name}.{sign}{bits}": f"{name}_{sign}{bits}" for sign in "su"}
            else:
                table |= {f"setp.{name}.s16": f"{name}_s16", f"setp.{name}.u16": f"{name}_u32"}
            if plain:
                table |= {f"setp.{name}.{sign}{bits}": f"{name}{wide}" for sign in "bsu"}
        for name, same in _UNSIGNED.items():
            table[f"setp.{name}.u{bits}"] = f"{same}_u{wide}"
    table |= {f"add.{kind}x2": "add16x2" for kind in ("s16", "u16")}
    table["shr.u16"] = table["shr.b16"] = "shr_u32"  # zeros are above
    for kind in ("s16", "u16", "s32", "u32"):
        table[f"mul.wide.{kind}"] = f"mulwide_{kind}"
    table |= {f"mad.wide.{kind}": f"madwide_{kind}" for kind in ("s16", "u16", "s32", "u32")}
    table |= {f"bfe.{kind}": f"bfe_{kind}" for kind in ("s32", "u32")}
    table |= {"abs.s32": "abs_s32", "popc.b32": "popc32", "clz.b32": "clz32", "bfi.b32": "bfi"}
    table |= {"prmt.b32": "prmt", "lop3.b32": "lop3", "shf.l.wrap.b32": "shf_l", "shf.r.wrap.b32": "shf_r"}
    table |= {f"{name}.pred": f"{name}_p" for name in ("and", "or", "xor", "not")}
    return table


def _floats() -> dict[str, str]:
    table = {f"setp.{name}.f32": f"{name}_f32" for name in _FLOAT_COMPARISONS}
    for name in ("add", "sub", "mul", "div", "fma"):
        table |= {f"{name}.rn.f32": f"{name}_f32"}
    table |= {
        f"{name}.f32": f"{name}_f32" for name in ("add", "sub", "mul", "neg", "abs", "max", "min", "copysign")
    }
    table |= {f"{name}.ftz.f32": f"{name}_ftz_f32" for name in ("add", "sub", "mul")}
    table |= {f"{name}.rn.ftz.f32": f"{name}_ftz_f32" for name in ("add", "sub", "mul", "fma")}
    table |= {"max.NaN.f32": "max_nan_f32", "min.NaN.f32": "min_nan_f32", "div.full.f32": "div_f32"}
    table |= {"ex2.approx.f32": "ex2", "ex2.approx.ftz.f32": "ex2_ftz", "lg2.approx.f32": "lg2"}
    table |= {"lg2.approx.ftz.f32": "lg2_ftz", "rcp.approx.f32": "rcp", "rcp.rn.f32": "rcp"}
    table |= {"sqrt.rn.f32": "sqrt_f32", "sqrt.approx.f32": "sqrt_f32", "rsqrt.approx.f32": "rsqrt"}
    for kind in ("bf16", "f16", "bf16x2", "f16x2"):
        table[f"fma.rn.{kind}"] = f"fma_{kind}"
    return table


def _conversions() -> dict[str, str]:
    table = {
        "cvt.rn.bf16.f32": "bf16_of_f32", "cvt.rn.f16.f32": "f16_of_f32", "cvt.f32.bf16": "f32_of_bf16",
        "cvt.f32.f16": "f32_of_f16", "cvt.rn.bf16x2.f32": "bf16x2_of_f32", "cvt.rn.f16x2.f32": "f16x2_of_f32",
        "cvt.rzi.s32.f32": "s32_of_f32", "cvt.rzi.u32.f32": "u32_of_f32", "cvt.rni.s32.f32": "s32_near_f32",
        "cvt.f64.f32": "f64_of_f32", "cvt.rn.f32.f64": "f32_of_f64",
    }  # fmt: skip
    table |= {f"cvt.rn.f32.{kind}": f"f32_of_{kind}" for kind in ("s32", "u32", "s64", "u64")}
    table |= {"cvt.rn.f32.u16": "f32_of_u32", "cvt.rn.f32.u8": "f32_of_u32", "cvt.rn.f32.s16": "f32_of_s16"}
    table |= {f"cvt.rn.{to}.{kind}": f"{to}_of_{kind}" for to in ("bf16", "f16") for kind in ("s16", "u16")}
    table |= {f"cvt.{to}16.s8": "signed8_16" for to in "su"}
    for sign in "su":
        for to in "su":
            table |= {f"cvt.{to}32.{sign}64": "low32", f"cvt.{to}64.{sign}64": "mov64"}
            table |= {
                f"cvt.{to}64.{sign}16": "sext64_s16" if sign == "s" else "zext64",
                f"cvt.{to}16.{sign}64": "low16_of_64",
            }
            table |= {
                f"cvt.{to}32.{sign}32": "mov32",
                f"cvt.{to}64.{sign}32": f"{sign.replace('u', 'z')}ext64",
            }
            table |= {f"cvt.{to}16.{sign}32": "low16", f"cvt.{to}16.{sign}16": "low16"}
            table |= {f"cvt.{to}32.{sign}16": "signed16" if sign == "s" else "low16"}
            table |= {f"cvt.{to}32.{sign}8": "signed8" if sign == "s" else "low8"}
        table |= {f"cvt.{to}{bits}.u8": "low8" for to in "su" for bits in (16, 32)}
    return table


DIRECT = _integers() | _floats() | _conversions()
"""Opcode of PTX to operation, the operands in the same order."""

SPECIAL = {
    "%tid.x": 0, "%ctaid.x": 1, "%ctaid.y": 2, "%ctaid.z": 3, "%nctaid.x": 4, "%nctaid.y": 5, "%nctaid.z": 6,
    "%ntid.x": 7, "%laneid": 8, "%warpid": 9,
}  # fmt: skip
"""Number of each special register (``machine/state.h``)."""

SPECIALS = len(SPECIAL)
SHARED_BASE = 1024
PARAMETER_BASE = 0x6000_0000_0000
"""Where a kernel finds its parameters when it takes their addresses."""

FLOAT16 = {
    "mul": ("a", "b", -0.0), "add": ("a", 1.0, "b"), "sub": ("b", -1.0, "a"),
}  # fmt: skip
"""Arithmetic of 16-bit floats as a fused multiply-add, which rounds the same."""

PAIRED = re.compile(r"(add|sub|mul)(\.rn)?\.(bf16x2|f16x2|bf16|f16)$")


def bits_of_type(kind: str) -> int:
    """Bits of ``b32``, ``f16x2`` and so on; 1 of ``pred``."""
    if kind == "pred":
        return 1
    match = re.fullmatch(r"(?:[bsuf]|bf)(\d+)(x2)?", kind)
    if match is None:
        raise ValueError(f"{kind} is no type of PTX that is known here")
    return int(match[1]) * (2 if match[2] else 1)
