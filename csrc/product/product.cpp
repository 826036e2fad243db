// Matrix products of a head, in the shapes in which a head has them: one side of tens of thousands, two of hundreds.
//
// Formula: c[i, j] (+)= sum_k a[i, k] b[k, j], with `rows` of a, `columns` of b and `depth` k.
//
// Layout: as in Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008), both factors are
// packed into panels of the order in which they are read (pack.h), and a tile of the result stays in registers while
// the depth runs (tile.h). The sizes are chosen by what stays in which cache:
//
//   c is cut into tiles of kRows rows by kColumns columns: the sums, in registers
//   the depth is cut into even steps of at most kDepth units
//     a panel of b, kColumns columns by one step       stays in the first and second cache while
//     kTilesAnItem panels of a, kRows rows by one step  in the second cache pass by it, one tile after the other
//
// Precision policy: factors are float64, float32, bfloat16 or float16; a float32 a beside a bfloat16 b is rounded as it
// is packed, to the nearest even, and beside a float16 b, which is widened, it keeps its digits. Sums are in float64 of
// float64 factors, else in float32, in the order of the depth, cut every step where the result is as wide (where it is
// not, a sum could not go on from step to step, and there is one step). A sum does not depend on the number of threads,
// on the shape of the result, nor on where tiles begin.
//
// Steps:
//   1. Decide whether all of b is packed at once, for all threads (b is small enough, and threads have rows enough), or
//      by each thread for its own part of c.
//   2. Pack b: of all steps, or of one step of the thread's columns.
//   3. For each group of kTilesAnItem tiles down, pack a, and for each panel of b compute the tiles. Each tile asks
//      memory for a part of what is packed next.
#include "product/product.h"

#include <omp.h>

#include <new>

#include "kernels.h"
#include "memory/pool.h"
#include "parallel.h"
#include "product/processor_tiles.h"
#include "product/tile.h"

namespace logitless::LL_ISA {
namespace {

constexpr int64_t kDepth = 576;            // units; a panel of b and kTilesAnItem of a then stay in the second cache
constexpr int64_t kTilesAnItem = 24;       // panels of a that are packed together
constexpr int64_t kPackedWhole = 1 << 23;  // bytes of b: no more are packed for all threads
constexpr int64_t kItemUnits = 32;         // units of depth that a thread packs of such a b, at a time

// Tiles of the result, down and across.
struct Range {
  int64_t top, bottom, left, right;
  int64_t tall() const { return bottom - top; }
  int64_t wide() const { return right - left; }
};

// What a type that is multiplied is packed as; the rows of a tile; and how many units of depth are multiplied at once.
template <class Multiplied> struct Form {
  using Packed = Multiplied;
  struct Engine {
    struct Use {};
  };
  static constexpr int64_t kTall = kRows, kUnits = 1;
};
#if defined(__AVX512F__)
template <class Of> struct Form<Tiled<Of>> {
  using Packed = BFloat16;
  using Engine = Of;
  static constexpr int64_t kTall = kTiledRows, kUnits = kBlock;
};
#endif

// Multiplied: the type that is multiplied; A and B: the ones that a and b are stored in; Out: that of c.
template <class Multiplied, class A, class B, class Out> struct Product {
  using T = typename Form<Multiplied>::Packed;
  using Engine = typename Form<Multiplied>::Engine;
  static constexpr int64_t kAcross = kColumns<T>, kTall = Form<Multiplied>::kTall, kUnits = Form<Multiplied>::kUnits;
  const ProductArgs& args;
  const Factor<A> a{static_cast<const A*>(args.a), args.a_row_stride, args.a_depth_stride};
  const Factor<B> b{static_cast<const B*>(args.b), args.b_column_stride, args.b_depth_stride};
  const int64_t threads = args.threads > 1 ? args.threads : 1;
  const int64_t tiles_down = pieces(args.rows, kTall), tiles_across = pieces(args.columns, kAcross);
  // The depth in units; how many steps it is cut into; what a step has, in units and in elements.
  const int64_t depth_units = pieces(args.depth, kPerUnit<T>);
  const int64_t steps = sizeof(Out) < sizeof(Compute<T>) ? 1 : pieces(depth_units, kDepth);
  const int64_t step_units = whole(pieces(depth_units, steps)), step = step_units * kPerUnit<T>;
  const int64_t bytes = args.rows * args.columns * static_cast<int64_t>(sizeof(Out)) +
                        args.depth * (args.rows + args.columns) * static_cast<int64_t>(sizeof(T));
  // Packed sizes, in units: a panel of b, and the panels of a that are packed together.
  const int64_t panel_units = kAcross * step_units;
  const int64_t a_units = smaller(kTilesAnItem, tiles_down) * kTall * step_units;

  // Units up to what is multiplied at once.
  static constexpr int64_t whole(int64_t units) { return pieces(units, kUnits) * kUnits; }
  // Where tiles begin: rows are spread evenly over the tiles.
  int64_t row_of(int64_t tile) const { return args.rows * tile / tiles_down; }
  int64_t depth_of(int64_t s) const { return smaller(step, args.depth - s * step); }

  void run() const {
    // 1.
    const int64_t b_units = steps * tiles_across * panel_units;
    if (b_units * static_cast<int64_t>(sizeof(Unit<T>)) <= kPackedWhole &&
        (steps == 1 || tiles_down >= kTilesAnItem * threads))
      run_by_rows(b_units);
    else
      run_by_parts();
  }

  // b is packed for all threads, and they take rows by turns.
  void run_by_rows(int64_t b_units) const {
    Unit<T>* const packed = acquire(b_units + threads * a_units);
    // 2.
    const int64_t parts = pieces(step_units, kItemUnits);
    parallel_for(parts * steps, args.threads, bytes, [&](int64_t i) {
      const int64_t s = i / parts;
      pack_columns(s, i % parts * kItemUnits, kItemUnits, 0, tiles_across, packed + s * tiles_across * panel_units);
    });
    // 3.
    const int64_t items =
        tiles_down < threads * kTilesAnItem ? smaller(threads, tiles_down) : pieces(tiles_down, kTilesAnItem);
    parallel_for(items, args.threads, bytes, [&](int64_t i) {
      const auto tile_of = [&](int64_t item) { return tiles_down * smaller(item, items) / items; };
      const int64_t next_row = row_of(tile_of(i + threads)), after = row_of(tile_of(i + threads + 1));
      Unit<T>* const own = packed + b_units + omp_get_thread_num() * a_units;
      multiply({tile_of(i), tile_of(i + 1), 0, tiles_across}, 0, steps, packed, own,
               sheet_of(a, next_row, after, 0, args.depth), Sheet{});
    });
    pool_release(packed);
  }

  // Each thread has its own part of the result, and packs what that needs.
  void run_by_parts() const {
    int64_t down = threads, across = 1;
    choose_grid(down, across);
    const int64_t own_units = a_units + pieces(tiles_across, across) * panel_units;
    Unit<T>* const packed = acquire(threads * own_units);
    parallel_for(down * across, args.threads, bytes, [&](int64_t i) {
      const int64_t y = i / across, x = i % across;
      const Range range{tiles_down * y / down, tiles_down * (y + 1) / down, tiles_across * x / across,
                        tiles_across * (x + 1) / across};
      Unit<T>* const rows = packed + omp_get_thread_num() * own_units;
      Unit<T>* const columns = rows + a_units;
      for (int64_t s = 0; s < steps; ++s) {
        // 2.
        pack_columns(s, 0, step_units, range.left, range.right, columns);
        // 3.
        const int64_t next = smaller((s + 1) * step, args.depth), after = smaller((s + 2) * step, args.depth);
        const int64_t last_column = smaller(range.right * kAcross, args.columns);
        multiply(range, s, 1, columns, rows, sheet_of(a, row_of(range.top), row_of(range.bottom), next, after),
                 sheet_of(b, range.left * kAcross, last_column, next, after));
      }
    });
    pool_release(packed);
  }

  static Unit<T>* acquire(int64_t units) {
    Unit<T>* const packed = static_cast<Unit<T>*>(pool_acquire(static_cast<size_t>(units) * sizeof(Unit<T>)));
    if (!packed) throw std::bad_alloc();
    return packed;
  }

  // Of the ways to lay as many parts as there are threads the one whose largest part is least; of those the widest.
  void choose_grid(int64_t& down, int64_t& across) const {
    int64_t least = pieces(tiles_down, threads) * tiles_across;
    for (int64_t x = 1; x <= smaller(threads, tiles_across); ++x) {
      if (threads % x) continue;
      const int64_t most = pieces(tiles_down, threads / x) * pieces(tiles_across, x);
      if (most > least) continue;
      least = most;
      across = x;
      down = threads / x;
    }
  }

  // 2. `count` units from `skip` on of step s, of the columns of tiles [left, right).
  void pack_columns(int64_t s, int64_t skip, int64_t count, int64_t left, int64_t right, Unit<T>* to) const {
    const int64_t begin = skip * kPerUnit<T>, depth = depth_of(s) - begin;
    if (depth <= 0) return;
    const auto column_of = [&](int64_t across) { return smaller((left + across) * kAcross, args.columns); };
    pack_panels<T>(b.at(0, s * step + begin), right - left, column_of, smaller(count * kPerUnit<T>, depth), kAcross,
                   to + skip * kAcross, panel_units);
    const int64_t end = pieces(depth_of(s), kPerUnit<T>), rest = whole(end) - end;
    if (rest && end <= skip + count)
      for (int64_t panel = 0; panel < right - left; ++panel)
        memset(to + panel * panel_units + end * kAcross, 0, static_cast<size_t>(rest * kAcross) * sizeof(Unit<T>));
  }

  // The panels of a from lane_of(0) to lane_of(panels), by a step's depth.
  template <class Lanes> void pack_rows(int64_t s, int64_t panels, const Lanes& lane_of, Unit<T>* to) const {
#if defined(__AVX512F__)
    if constexpr (kUnits > 1) {
      for (int64_t p = 0; p < panels; ++p)
        pack_tiles(a.at(lane_of(p), s * step), lane_of(p + 1) - lane_of(p), depth_of(s), to + p * kTall * step_units,
                   kTall / 2 * step_units);
      return;
    }
#endif
    pack_panels<T>(a.at(0, s * step), panels, lane_of, depth_of(s), 0, to, kTall * step_units);
  }

  // 3. Steps [first, first + count) of a range, whose columns are packed in `columns`; `rows` is room for panels of a.
  // The tiles ask for the parts of next_a and next_b by turns, all of them by the last tile.
  void multiply(const Range& range, int64_t first, int64_t count, const Unit<T>* columns, Unit<T>* rows,
                const Sheet& next_a, const Sheet& next_b) const {
    [[maybe_unused]] const typename Engine::Use use;
    const int64_t turns = range.tall() * range.wide() * count;
    const int64_t parts_a = next_a.parts(step_units), parts = parts_a + next_b.parts(step_units);
    int64_t turn = 0;
    for (int64_t tile = range.top; tile < range.bottom; tile += kTilesAnItem) {
      const int64_t last = smaller(range.bottom, tile + kTilesAnItem);
      for (int64_t s = 0; s < count; ++s) {
        const int64_t depth = depth_of(first + s);
        const auto first_row = [&](int64_t i) { return row_of(tile + i); };
        pack_rows(first + s, last - tile, first_row, rows);
        for (int64_t across = 0; across < range.wide(); ++across) {
          const int64_t column = (range.left + across) * kAcross;
          const Corner corner{args.columns - column, args.accumulate || first + s > 0};
          const Unit<T>* const panel = columns + (s * range.wide() + across) * panel_units;
          for (int64_t i = tile; i < last; ++i, ++turn) {
            const int64_t part = turn * parts / turns;
            const Ahead ahead = parts == 0       ? Ahead{reinterpret_cast<const char*>(panel), 0}
                                : part < parts_a ? part_of(next_a, part, step_units)
                                                 : part_of(next_b, part - parts_a, step_units);
            Out* const c = static_cast<Out*>(args.c) + row_of(i) * args.c_row_stride + column;
            const Unit<T>* const own = rows + (i - tile) * kTall * step_units;
#if defined(__AVX512F__)
            if constexpr (kUnits > 1) {
              tiled_sums_of<Engine>(row_of(i + 1) - row_of(i), whole(pieces(depth, kPerUnit<T>)) / kUnits, own,
                                    kTall / 2 * step_units, panel, c, args.c_row_stride, corner);
              continue;
            }
#endif
            if constexpr (kUnits == 1)
              sums_of_height<T>(row_of(i + 1) - row_of(i), pieces(depth, kPerUnit<T>), own, panel, c, args.c_row_stride,
                                corner, ahead);
          }
        }
      }
    }
  }

  // Lanes [first_lane, last_lane) by depth [begin, end) of a factor, as they lie in memory.
  template <class S>
  static Sheet sheet_of(const Factor<S>& factor, int64_t first_lane, int64_t last_lane, int64_t begin, int64_t end) {
    const int64_t lanes = last_lane - first_lane, depth = end - begin, each = static_cast<int64_t>(sizeof(S));
    if (lanes <= 0 || depth <= 0) return {};
    const char* const from = reinterpret_cast<const char*>(factor.at(first_lane, begin).data);
    if (factor.depth_stride == 1) return {from, factor.lane_stride * each, lanes, pieces(depth * each, kLine)};
    return {from, factor.depth_stride * each, depth, pieces(lanes * each, kLine)};
  }
};

#if defined(__AVX512F__)
template <class Multiplied> void of_bfloat16(const ProductArgs& args) {
  const bool narrow = static_cast<DType>(args.c_dtype) == DType::kBFloat16;
  if (static_cast<DType>(args.a_dtype) != DType::kFloat32) {
    if (narrow) return Product<Multiplied, BFloat16, BFloat16, BFloat16>{args}.run();
    return Product<Multiplied, BFloat16, BFloat16, float>{args}.run();
  }
  if (narrow) return Product<Multiplied, float, BFloat16, BFloat16>{args}.run();
  return Product<Multiplied, float, BFloat16, float>{args}.run();
}
#endif

}  // namespace

#if defined(__AVX512F__)
bool processor_tiles_agree() {
  // Memory of its own: a process that asks this may have been forked from one with many threads.
  static uint32_t a[2][2][kTileUnits], b[2 * kBlock][kTiledColumns];
  uint32_t bits = 1;
  const auto drawn = [&] {  // two numbers of size 1/2 to 4, of either sign
    bits = bits * 1664525u + 1013904223u;
    return (bits & 0x80ff80ffu) | 0x3f003f00u;
  };
  for (auto& half : a)
    for (auto& block : half)
      for (uint32_t& unit : block) unit = drawn();
  for (auto& row : b)
    for (uint32_t& unit : row) unit = drawn();
  alignas(64) static TiledSums found, expected;
  {
    const Processor::Use use;
    Processor::multiply(2, a[0][0], a[1][0], b[0], found);
  }
  Emulated::multiply(2, a[0][0], a[1][0], b[0], expected);
  return memcmp(found, expected, sizeof found) == 0;
}
#endif

void product(const ProductArgs& args) {
  if (args.rows == 0 || args.columns == 0) return;
#if defined(__AVX512F__)
  const bool wide_a = static_cast<DType>(args.a_dtype) == DType::kFloat32;
  if (static_cast<DType>(args.b_dtype) == DType::kFloat64) return Product<double, double, double, double>{args}.run();
  if (static_cast<DType>(args.b_dtype) == DType::kBFloat16) {
    if (args.tiles == Tiles::kProcessor) return of_bfloat16<Tiled<Processor>>(args);
    if (args.tiles == Tiles::kEmulated) return of_bfloat16<Tiled<Emulated>>(args);
    return of_bfloat16<BFloat16>(args);
  }
  if (static_cast<DType>(args.b_dtype) == DType::kFloat16) {
    const bool narrow = static_cast<DType>(args.c_dtype) == DType::kFloat16;
    if (!wide_a) {
      if (narrow) return Product<float, Float16, Float16, Float16>{args}.run();
      return Product<float, Float16, Float16, float>{args}.run();
    }
    if (narrow) return Product<float, float, Float16, Float16>{args}.run();
    return Product<float, float, Float16, float>{args}.run();
  }
#endif
  Product<float, float, float, float>{args}.run();
}

}  // namespace logitless::LL_ISA
