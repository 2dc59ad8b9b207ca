// Weight matrices in each format, and how one step along a row is read. `group` comes from Python's `layout_of`: columns
// per scale for int4, rows per scale for fp8.
#pragma once

#include "packing.h"

namespace moiety {

// float, bf16 and int8 matrices: the elements, row after row. int8 has a scale per row, which the caller applies.
template <class W>
struct Matrix {
    using Format = W;
    using T = typename Element<W>::type;
    static constexpr bool in_line = true;  // a step of a row is one cache line, and rows are contiguous
    const T* data;
    const float* scale;
    int64_t depth;

    static Matrix of(const void* const* tensors, int64_t depth, int64_t) {
        return {static_cast<const T*>(tensors[0]), static_cast<const float*>(tensors[1]), depth};
    }
    const T* at(int64_t row, int64_t column) const { return data + row * depth + column; }
    auto read(int64_t row, int64_t column) const { return Packing<W>::read(at(row, column)); }
    auto read(int64_t row, int64_t column, int64_t count) const { return Packing<W>::read(at(row, column), count); }
    void prefetch(int64_t row, int64_t column) const {
        _mm_prefetch(reinterpret_cast<const char*>(at(row, column)), _MM_HINT_T0);
    }
    void prefetch_line(int64_t row, int64_t line) const {
        _mm_prefetch(reinterpret_cast<const char*>(at(row, 0)) + 64 * line, _MM_HINT_T0);
    }
};

inline int64_t log2_of(int64_t value) {
    int64_t shift = 0;
    while ((int64_t{1} << shift) < value) ++shift;
    return shift;
}

// A step of four-bit codes is 64 bytes. Lane l of a load holds columns 8 l to 8 l + 7, and packed rows have the same order.
// So a shift moves one column of every lane to the low bits, where a permutation looks it up.
struct Nibbles {
    const std::uint8_t* codes;
    int64_t bytes, shift, groups;  // bytes and groups per row; the group of a column is column >> shift
    __m512i lane;                  // the index of each lane's scale among a step's scales

    static Nibbles of(const void* codes, int64_t depth, int64_t group) {
        const bool one = group >= depth;
        alignas(64) std::int32_t lane[16];
        for (int l = 0; l < 16; ++l) lane[l] = one || group >= 128 ? 0 : static_cast<std::int32_t>(8 * l / group);
        return {static_cast<const std::uint8_t*>(codes), depth / 2, one ? 62 : log2_of(group), one ? 1 : depth / group,
                _mm512_load_si512(lane)};
    }
    __m512i load(int64_t row, int64_t column) const { return _mm512_loadu_si512(codes + row * bytes + column / 2); }
    __m512i load(int64_t row, int64_t column, int64_t count) const {
        return _mm512_maskz_loadu_epi8((1ull << (count / 2)) - 1, codes + row * bytes + column / 2);
    }
    void prefetch(int64_t row, int64_t column) const {
        _mm_prefetch(reinterpret_cast<const char*>(codes + row * bytes + column / 2), _MM_HINT_T0);
    }
    // The index of the first scale of the step at `column`, and the number of its scales.
    int64_t scale_at(int64_t row, int64_t column) const { return row * groups + (column >> shift); }
    int64_t scales(int64_t column) const { return std::min<int64_t>(16, groups - (column >> shift)); }
    __m512 spread(__m512 of_step) const { return _mm512_permutexvar_ps(lane, of_step); }
};

inline void look_up(__m512i codes, __m512 table, Scaled& to) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) to.values[j] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * j), table);
}

template <class S>
struct Matrix<Int4<S>> {
    using Format = Int4<S>;
    static constexpr bool in_line = false;
    Nibbles nibbles;
    const S* scale;
    const std::uint8_t* zero;  // or null: 8 everywhere

    static Matrix of(const void* const* tensors, int64_t depth, int64_t group) {
        return {Nibbles::of(tensors[0], depth, group), static_cast<const S*>(tensors[1]),
                static_cast<const std::uint8_t*>(tensors[2])};
    }
    Scaled decoded(__m512i codes, int64_t row, int64_t column) const {
        const int64_t at = nibbles.scale_at(row, column), count = nibbles.scales(column);
        Scaled step;
        look_up(codes, _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7), step);
        if (zero) {
            const __m512i bytes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(count), zero + at));
            const __m512 offset = nibbles.spread(_mm512_cvtepi32_ps(_mm512_sub_epi32(bytes, _mm512_set1_epi32(8))));
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j) step.values[j] = _mm512_sub_ps(step.values[j], offset);
        }
        step.scale = nibbles.spread(load(scale + at, count));
        return step;
    }
    Scaled read(int64_t row, int64_t column) const { return decoded(nibbles.load(row, column), row, column); }
    Scaled read(int64_t row, int64_t column, int64_t count) const {
        return decoded(nibbles.load(row, column, count), row, column);
    }
    void prefetch(int64_t row, int64_t column) const { nibbles.prefetch(row, column); }
};

template <>
struct Matrix<Mxfp4> {
    using Format = Mxfp4;
    static constexpr bool in_line = false;
    Nibbles nibbles;
    const std::uint8_t* scale;  // exponents of two plus 127: the exponent field of a float

    static Matrix of(const void* const* tensors, int64_t depth, int64_t) {
        return {Nibbles::of(tensors[0], depth, 32), static_cast<const std::uint8_t*>(tensors[1])};
    }
    Scaled decoded(__m512i codes, int64_t row, int64_t column) const {
        const int64_t at = nibbles.scale_at(row, column), count = nibbles.scales(column);
        Scaled step;
        look_up(codes, _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6), step);
        const __m512i exponents = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(count), scale + at));
        const __m512i least = _mm512_set1_epi32(1 << 22);  // 2^-127, a subnormal float
        step.scale = nibbles.spread(_mm512_castsi512_ps(_mm512_max_epi32(_mm512_slli_epi32(exponents, 23), least)));
        return step;
    }
    Scaled read(int64_t row, int64_t column) const { return decoded(nibbles.load(row, column), row, column); }
    Scaled read(int64_t row, int64_t column, int64_t count) const {
        return decoded(nibbles.load(row, column, count), row, column);
    }
    void prefetch(int64_t row, int64_t column) const { nibbles.prefetch(row, column); }
};

// Formats of one byte per column, which `F` widens. A step is 128 bytes in order, all with one scale.
template <class F>
struct Bytes {
    using Format = F;
    static constexpr bool in_line = false;
    const std::uint8_t* codes;
    const float* scale;
    int64_t depth, shift;  // one scale serves 1 << shift rows

    Scaled read(int64_t row, int64_t column) const {
        const std::uint8_t* from = codes + row * depth + column;
        Scaled step;
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j)
            step.values[j] = Matrix<F>::widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16 * j)));
        step.scale = static_cast<const Matrix<F>*>(this)->scale_of(row, column);
        return step;
    }
    Scaled read(int64_t row, int64_t column, int64_t count) const {
        const std::uint8_t* from = codes + row * depth + column;
        Scaled step;
        for (int j = 0; j < 8; ++j) {
            const __mmask16 mask = first(std::max<int64_t>(0, count - 16 * j));
            step.values[j] = Matrix<F>::widened(_mm_maskz_loadu_epi8(mask, from + 16 * j));
        }
        step.scale = static_cast<const Matrix<F>*>(this)->scale_of(row, column);
        return step;
    }
    void prefetch(int64_t row, int64_t column) const {
        const char* from = reinterpret_cast<const char*>(codes + row * depth + column);
        _mm_prefetch(from, _MM_HINT_T0);
        _mm_prefetch(from + 64, _MM_HINT_T0);
    }
};

// Past a row's end a code reads as 0, which means -128, but x is 0 there.
template <>
struct Matrix<Int8> : Bytes<Int8> {
    static Matrix of(const void* const* tensors, int64_t depth, int64_t) {
        return {{static_cast<const std::uint8_t*>(tensors[0]), static_cast<const float*>(tensors[1]), depth, 0}};
    }
    static __m512 widened(__m128i bytes) {
        return _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), _mm512_set1_ps(128));
    }
    __m512 scale_of(int64_t row, int64_t) const { return _mm512_set1_ps(scale[row]); }
};

// e4m3 bits shifted into place form a half whose exponent is 8 too small, so the scale gets a factor of 256. NaN reads as 480.
template <>
struct Matrix<Fp8> : Bytes<Fp8> {
    static Matrix of(const void* const* tensors, int64_t depth, int64_t block_rows) {
        return {{static_cast<const std::uint8_t*>(tensors[0]), static_cast<const float*>(tensors[1]), depth,
                 log2_of(block_rows)}};
    }
    static __m512 widened(__m128i bytes) {
        const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
        return _mm512_cvtph_ps(_mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<short>(0xbf80))));
    }
    __m512 scale_of(int64_t row, int64_t column) const {
        return _mm512_set1_ps(256 * scale[(row >> shift) * ((depth + 127) / 128) + column / 128]);
    }
};

}  // namespace moiety
