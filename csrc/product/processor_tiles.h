// bfloat16 products by the tiles of the processor (AMX), which are 16 rows of 64 bytes each.
//
// Formula: as in tile.h, of up to 32 rows and 32 columns of c: two tiles of a, two of b and four of sums.
//
// Layout: a panel of a has two halves of sixteen rows, each cut along the depth into blocks of sixteen units, as
// panel[half][block][row][unit]: a block is one tile. A panel of b is that of tile.h, panel[unit][column], so that
// sixteen units of half of its columns are one tile. Both have zeros up to whole blocks.
//
// Precision policy: of each block the products of even and of odd depths are added up in float, each in the order of
// the depth, then to each other and to the sum; numbers below the normal range are taken, and given, as 0. That is what
// TDPBF16PS does (Intel, Software Developer's Manual, volume 2), and what `Emulated` does where there are no such
// tiles: tests take it, and a processor's tiles are taken once they agreed with it.
//
// Steps: 1. The sums begin at 0. 2. For each block, load the tiles of a and b, and multiply. 3. Store the sums, and put
// or add them to c.
#pragma once

#include "product/tile.h"

#if defined(__AVX512F__)
#include <immintrin.h>

namespace logitless::LL_ISA {
namespace {  // local to the kernel that includes this, as the kernel itself is

inline constexpr int kBlock = 16;  // rows of a tile, and units of its 64 bytes
inline constexpr int kTileUnits = kBlock * kBlock;
inline constexpr int kTiledRows = 2 * kBlock, kTiledColumns = 2 * kBlock;
using TiledSums = float[kTiledRows][kTiledColumns];

// The type that is multiplied where an Engine's tiles multiply bfloat16.
template <class Engine> struct Tiled {};

// The processor's own. GCC's macros take numbers of tiles as they are written, and say nothing of the memory they read.
struct Processor {
  // What a thread must say before its first tile, and take back after its last.
  struct Use {
    __attribute__((target("amx-tile"))) Use() {
      alignas(64) struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {kBlock, kBlock, kBlock, kBlock, kBlock, kBlock, kBlock, kBlock};
      } shape;
      static_assert(sizeof shape == 64);
      __asm__ volatile("ldtilecfg %0" : : "m"(shape));  // GCC's own says that it reads eight bytes
    }
    __attribute__((target("amx-tile"))) ~Use() { _tile_release(); }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
  };

  __attribute__((target("amx-tile,amx-bf16"), noinline)) static void multiply(int64_t blocks, const uint32_t* upper,
                                                                              const uint32_t* lower, const uint32_t* b,
                                                                              TiledSums& sums) {
    __asm__ volatile("" ::: "memory");
    // 1.
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    // 2.
    for (int64_t k = 0; k < blocks; ++k) {
      _tile_loadd(4, upper + k * kTileUnits, kBlock * 4);
      _tile_loadd(6, b + k * kBlock * kTiledColumns, kTiledColumns * 4);
      _tile_loadd(7, b + k * kBlock * kTiledColumns + kBlock, kTiledColumns * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (lower) {
        _tile_loadd(5, lower + k * kTileUnits, kBlock * 4);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    // 3.
    _tile_stored(0, &sums[0][0], kTiledColumns * 4);
    _tile_stored(1, &sums[0][kBlock], kTiledColumns * 4);
    _tile_stored(2, &sums[kBlock][0], kTiledColumns * 4);
    _tile_stored(3, &sums[kBlock][kBlock], kTiledColumns * 4);
    __asm__ volatile("" ::: "memory");
  }
};

// The same in other instructions.
struct Emulated {
  struct Use {};

  static float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }
  static float half(uint32_t unit, int odd) {
    const uint32_t bits = odd ? unit & 0xffff0000u : unit << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return flushed(value);
  }

  static void multiply(int64_t blocks, const uint32_t* upper, const uint32_t* lower, const uint32_t* b,
                       TiledSums& sums) {
    memset(sums, 0, sizeof sums);
    for (int64_t k = 0; k < blocks; ++k) {
      for (int i = 0; i < (lower ? kTiledRows : kBlock); ++i) {
        const uint32_t* const a = (i < kBlock ? upper : lower) + k * kTileUnits + i % kBlock * kBlock;
        float parts[2][kTiledColumns] = {};
        for (int u = 0; u < kBlock; ++u) {
          const uint32_t* const row = b + (k * kBlock + u) * kTiledColumns;
          for (int odd = 0; odd < 2; ++odd)
            for (int j = 0; j < kTiledColumns; ++j)
              parts[odd][j] = flushed(__builtin_fmaf(half(a[u], odd), half(row[j], odd), parts[odd][j]));
        }
        for (int j = 0; j < kTiledColumns; ++j) sums[i][j] = flushed(sums[i][j] + flushed(parts[0][j] + parts[1][j]));
      }
    }
  }
};

// Up to 32 rows by `depth` elements of a, as the two halves of a panel; what is not there is 0.
template <class S>
LL_INLINE void pack_tiles(Factor<S> from, int64_t lanes, int64_t depth, uint32_t* panel, int64_t half_units) {
  for (int64_t first = 0; first < lanes; first += kBlock, panel += half_units) {
    const int64_t there = smaller(kBlock, lanes - first);
    for (int64_t k = 0; k < depth; k += 2 * kBlock) {
      const Factor<S> block = from.at(first, k);
      uint32_t* const tile = panel + k / (2 * kBlock) * kTileUnits;
      if (__is_same(S, BFloat16) && from.depth_stride == 1 && k + 2 * kBlock <= depth) {
        for (int64_t i = 0; i < kBlock; ++i) {
          if (i < there)
            memcpy(tile + i * kBlock, block.data + i * block.lane_stride, kBlock * sizeof(uint32_t));
          else
            memset(tile + i * kBlock, 0, kBlock * sizeof(uint32_t));
        }
        continue;
      }
      alignas(64) uint32_t turned[kBlock][kBlock] = {};  // [unit][row]
      pack<BFloat16>(block, there, smaller(2 * kBlock, depth - k), kBlock, &turned[0][0]);
      const uint32_t* units[kBlock];
      for (int u = 0; u < kBlock; ++u) units[u] = turned[u];
      __m512i rows[kBlock];
      transpose(units, rows);
      for (int i = 0; i < kBlock; ++i) _mm512_storeu_si512(tile + i * kBlock, rows[i]);
    }
  }
}

// `tall` rows of c; `blocks` of the depth, `half_units` from one half of the panel of a to the other.
template <class Engine, class Out>
void tiled_sums_of(int64_t tall, int64_t blocks, const uint32_t* a, int64_t half_units, const uint32_t* b, Out* c,
                   int64_t c_row_stride, Corner corner) {
  alignas(64) TiledSums sums;
  Engine::multiply(blocks, a, tall > kBlock ? a + half_units : nullptr, b, sums);
  for (int64_t i = 0; i < tall; ++i) {
    Out* const row = c + i * c_row_stride;
    put(row, load(&sums[i][0]), corner.columns, corner.accumulate);
    put(row + kBlock, load(&sums[i][kBlock]), corner.columns - kBlock, corner.accumulate);
  }
}

}  // namespace
}  // namespace logitless::LL_ISA
#endif
