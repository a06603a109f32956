"""A product's sums where the tensor cores leave them: added to a weight and stored, without shared memory.

A thread holds two neighbouring columns of every eighth (PTX ISA, wgmma accumulator fragments), too narrow to read or
write weights by, so a tile is usually laid out anew: 256 KB through shared memory and 16 barriers for 128x256. Where
the second factor's rows are packed in another order (tiles.interleave), the same registers are eight neighbouring
columns of the output, 16 bytes in 16 bit, and the tile goes straight to memory. The compiler does not find that layout
on its own: loads and stores have layouts of their own, assembly takes the one it is given.
"""

from hueshift.kernels.launch import interpreted, jit, tl

# The interpreter knows no assembly: it reads and writes the same words one by one.
ASSEMBLY = tl.constexpr(not interpreted())
# Packed conversions run at four times the rate of single ones, which the compiler takes for half of the elements.
UNPACK_HALF = tl.constexpr(
    ".reg .b16 first, second; mov.b32 {first, second}, $1; cvt.f32.f16 low, first; cvt.f32.f16 high, second;"
)
UNPACK_BFLOAT = tl.constexpr(
    ".reg .b32 bits; shl.b32 bits, $1, 16; mov.b32 low, bits; and.b32 bits, $1, 0xffff0000; mov.b32 high, bits;"
)


@jit
def in_order(tile: tl.tensor, ROWS: tl.constexpr, COLS: tl.constexpr) -> tl.tensor:
    """Put the columns of a product with an interleaved factor back into order. [ROWS, COLS], COLS a multiple of 32."""
    parts = tl.reshape(tile, (ROWS, COLS // 32, 4, 4, 2))
    return tl.reshape(tl.permute(parts, (0, 1, 3, 2, 4)), (ROWS, COLS))


@jit
def add_to_words(words: tl.tensor, tile: tl.tensor, element: tl.constexpr, ROWS: tl.constexpr,
                 COLS: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Return weight + tile, added in fp32: tile [ROWS, COLS] fp32; words as of read_words, [ROWS, COLS / 8].

    Where neither of two neighbours changes their word is kept: -0.0 + 0.0 would turn into +0.0.
    """
    even, odd = tl.split(tl.reshape(tile, (ROWS, COLS // 8, 4, 2)))
    # The second to last of four dimensions has the words' numbers: first and third, second and fourth.
    even_low, even_high = tl.split(tl.reshape(even, (ROWS, COLS // 8, 2, 2)))
    odd_low, odd_high = tl.split(tl.reshape(odd, (ROWS, COLS // 8, 2, 2)))
    even_first, even_third = tl.split(even_low)
    even_second, even_fourth = tl.split(even_high)
    odd_first, odd_third = tl.split(odd_low)
    odd_second, odd_fourth = tl.split(odd_high)
    return (
        _add_pair(words[0], even_first, odd_first, element),
        _add_pair(words[1], even_second, odd_second, element),
        _add_pair(words[2], even_third, odd_third, element),
        _add_pair(words[3], even_fourth, odd_fourth, element),
    )


@jit
def _add_pair(word: tl.tensor, first: tl.tensor, second: tl.tensor, element: tl.constexpr) -> tl.tensor:
    """Add two fp32 changes to a word's two numbers. Bits are kept by pairs: where both changes are 0 the word stays as
    it is, and beside a neighbour that changes -0.0 + 0.0 is +0.0 and a NaN may come back with other bits.
    """
    if ASSEMBLY:
        unpack: tl.constexpr = UNPACK_HALF if element == tl.float16 else UNPACK_BFLOAT
        pack: tl.constexpr = "cvt.rn.f16x2.f32" if element == tl.float16 else "cvt.rn.bf16x2.f32"
        total = tl.inline_asm_elementwise(
            "{ .reg .f32 low, high; .reg .b32 both, other; .reg .pred same;"
            + unpack
            + "add.f32 low, low, $2; add.f32 high, high, $3;"
            + pack
            + " $0, high, low;"
            "mov.b32 both, $2; mov.b32 other, $3; or.b32 both, both, other; and.b32 both, both, 0x7fffffff;"
            "setp.eq.u32 same, both, 0; selp.b32 $0, $1, $0, same; }",
            "=&r,r,f,f",
            [word, first, second],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        low = (word & 0xFFFF).to(tl.uint16).to(element, bitcast=True).to(tl.float32) + first
        high = ((word >> 16) & 0xFFFF).to(tl.uint16).to(element, bitcast=True).to(tl.float32) + second
        low_bits = low.to(element).to(tl.uint16, bitcast=True).to(tl.int32)
        high_bits = high.to(element).to(tl.uint16, bitcast=True).to(tl.int32)
        total = tl.where((first == 0.0) & (second == 0.0), word, low_bits | (high_bits << 16))
    return total


@jit
def read_words(base: tl.tensor, at: tl.tensor) -> tl.tensor:
    """Read 16 bytes, number `at` [rows, cols] int32 from address `base`, as four int32 tensors.

    Nothing is read where `at` is -1. What is found there is 0 in the interpreter and undefined on a GPU, where no
    register is written: nobody may store it, and write_words does not, for the same `at`.
    """
    if ASSEMBLY:
        # Called pure, which it is as long as nobody writes there meanwhile: the compiler copies it for each result, and
        # makes one of them again if it may.
        words = tl.inline_asm_elementwise(
            """{
            .reg .pred inside;
            .reg .b64 address;
            setp.ge.s32 inside, $5, 0;
            mad.wide.s32 address, $5, 16, $4;
            @inside ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [address];
            }""",
            "=r,=r,=r,=r,l,r",
            [base, at],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        first = base.to(tl.pointer_type(tl.int32)) + at * 4
        inside = at >= 0
        words = (
            tl.load(first, inside, 0),
            tl.load(first + 1, inside, 0),
            tl.load(first + 2, inside, 0),
            tl.load(first + 3, inside, 0),
        )
    return words


@jit
def write_words(base: tl.tensor, at: tl.tensor, words: tl.tensor) -> None:
    """Write what read_words reads."""
    if ASSEMBLY:
        tl.inline_asm_elementwise(
            """{
            .reg .pred inside;
            .reg .b64 address;
            setp.ge.s32 inside, $2, 0;
            mad.wide.s32 address, $2, 16, $1;
            @inside st.global.L1::no_allocate.v4.b32 [address], {$3, $4, $5, $6};
            mov.b32 $0, 0;
            }""",
            "=r,l,r,r,r,r,r",
            [base, at, words[0], words[1], words[2], words[3]],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        first = base.to(tl.pointer_type(tl.int32)) + at * 4
        inside = at >= 0
        tl.store(first, words[0], inside)
        tl.store(first + 1, words[1], inside)
        tl.store(first + 2, words[2], inside)
        tl.store(first + 3, words[3], inside)
