// The best rows of each query: which score passes, and which of those that passed are the k best.
//
// Formula: a is before b if its score is larger, or is equal and a's number is smaller. A NaN is after every number.
//
// Layout: score and number of a row are one integer, its key, which is larger for the better row: the score's bits in
// the order of integers above, the complement of the number below. So the k best are the k largest keys, in whatever
// order they came, and no two rows are equal.
//
// Steps: 1. A score below the floor's is passed over; that is decided for a vector of scores at once. 2.
// What passes is appended. 3. When there is no room left, the k largest are kept, and the smallest of them is the
// floor.
#pragma once

#include "parallel.h"

namespace logitless::LL_ISA {
namespace {  // local to the kernel that includes this, as the kernel itself is

LL_INLINE uint32_t order_of(float score) {
  if (score != score) return 0;
  const float number = score + 0.0f;  // of the two zeros the positive one
  int32_t bits;
  memcpy(&bits, &number, sizeof bits);
  return static_cast<uint32_t>(bits ^ ((bits >> 31) & INT32_MAX)) ^ 0x80000000u;
}
LL_INLINE float score_of(uint64_t key) {
  const uint32_t order = static_cast<uint32_t>(key >> 32);
  if (order == 0) return kNaN<float>;
  int32_t bits = static_cast<int32_t>(order ^ 0x80000000u);
  bits ^= (bits >> 31) & INT32_MAX;
  float score;
  memcpy(&score, &bits, sizeof score);
  return score;
}
LL_INLINE uint64_t key_of(float score, int64_t row) {
  return static_cast<uint64_t>(order_of(score)) << 32 | ~static_cast<uint32_t>(row);
}
LL_INLINE int64_t row_of_key(uint64_t key) { return ~static_cast<uint32_t>(key); }

// The highest bit in which keys differ; 0 if they do not.
inline uint64_t highest_difference(const uint64_t* keys, int64_t count) {
  uint64_t bits = 0;
  for (int64_t i = 1; i < count; ++i) bits |= keys[i] ^ keys[0];
  return bits == 0 ? 0 : uint64_t{1} << (63 - __builtin_clzll(bits));
}

// Brings the keys that have a bit to the front; gives how many they are.
inline int64_t bring_forward(uint64_t* keys, int64_t count, uint64_t bit) {
  int64_t first = 0, last = count;
  while (true) {
    while (first < last && (keys[first] & bit)) ++first;
    while (first < last && !(keys[last - 1] & bit)) --last;
    if (first == last) return first;
    const uint64_t key = keys[first];
    keys[first] = keys[last - 1];
    keys[last - 1] = key;
  }
}

// Brings the k largest to the front, in any order: cut by the highest bit in which they differ, again and again.
inline void choose_largest(uint64_t* keys, int64_t count, int64_t k) {
  while (0 < k && k < count) {
    const int64_t larger = bring_forward(keys, count, highest_difference(keys, count));
    if (k <= larger) {
      count = larger;
    } else {
      keys += larger;
      count -= larger;
      k -= larger;
    }
  }
}

// The largest first.
inline void sort_descending(uint64_t* keys, int64_t count) {
  constexpr int64_t kFew = 16;
  while (count > kFew) {
    const int64_t larger = bring_forward(keys, count, highest_difference(keys, count));
    sort_descending(keys, larger);
    keys += larger;
    count -= larger;
  }
  for (int64_t i = 1; i < count; ++i) {
    const uint64_t key = keys[i];
    int64_t at = i;
    for (; at > 0 && keys[at - 1] < key; --at) keys[at] = keys[at - 1];
    keys[at] = key;
  }
}

// What a thread has found for a query.
struct Best {
  uint64_t* keys;
  int64_t count;
  uint64_t floor;   // a key that is not larger is none of the best
  float threshold;  // its score: smaller ones are passed over. NaN: none is

  LL_INLINE void begin(uint64_t* room, bool full, float last_score) {
    keys = room;
    count = 0;
    // A row of these comes after those before, and has to have the larger score.
    floor = full ? static_cast<uint64_t>(order_of(last_score)) << 32 | UINT32_MAX : 0;
    threshold = full ? last_score : kNaN<float>;
  }
  LL_INLINE void add(float score, int64_t row, int64_t k, int64_t capacity) {
    const uint64_t key = key_of(score, row);
    if (key <= floor) return;
    if (count == capacity) keep_best(k);
    keys[count++] = key;
  }
  void keep_best(int64_t k) {
    choose_largest(keys, count, k);
    count = smaller(count, k);
    uint64_t least = keys[0];
    for (int64_t i = 1; i < count; ++i) least = keys[i] < least ? keys[i] : least;
    floor = least;
    threshold = score_of(least);
  }
};

// Bit i is set where lane i of the scores may be among the best; an equal score and a NaN are looked at more closely.
LL_INLINE uint32_t passing_bits(Vec<float> scores, float threshold) {
  return ~greater_bits(splat(threshold), scores) & kAllBits<float>;
}

}  // namespace
}  // namespace logitless::LL_ISA
