// The inner loops of attention, for one variant of Vec; included behind vector_math.h.

// Scores of kQueries queries and kRuns runs of 16 tokens: the sum over head_dim in order.
template <class T, int kQueries, int kRuns>
inline void score_runs(const float* query, int dim, const char* const* keys, float* scores) {
  Vec sums[kQueries][kRuns];
#pragma GCC unroll 8
  for (int m = 0; m < kQueries; ++m)
#pragma GCC unroll 8
    for (int r = 0; r < kRuns; ++r) sums[m][r] = set1(0.0f);
  const T* run[kRuns];
#pragma GCC unroll 8
  for (int r = 0; r < kRuns; ++r) run[r] = reinterpret_cast<const T*>(keys[r]);
  for (int d = 0; d < dim; ++d) {
    Vec key[kRuns];
#pragma GCC unroll 8
    for (int r = 0; r < kRuns; ++r) key[r] = load(run[r] + d * kRun);
#pragma GCC unroll 8
    for (int m = 0; m < kQueries; ++m) {
      const Vec factor = set1(query[m * kQueryStride + d]);
#pragma GCC unroll 8
      for (int r = 0; r < kRuns; ++r) sums[m][r] = accumulate(sums[m][r], factor, key[r]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kQueries; ++m)
#pragma GCC unroll 8
    for (int r = 0; r < kRuns; ++r) store(scores + m * kScoreStride + r * kRun, sums[m][r]);
}

template <class T, int kQueries>
inline void score(const Tile& tile, const Runs& runs, int first, int last, int begin,
                  float* scores) {
  constexpr int wide = std::clamp(kAccumulators / kQueries, 1, 4);
  const float* query = tile.query + begin * kQueryStride;
  float* rows = scores + begin * kScoreStride;
  int r = first;
  for (; r + wide <= last; r += wide)
    score_runs<T, kQueries, wide>(query, tile.head_dim, runs.keys + r, rows + r * kRun);
  if constexpr (wide > 2)
    for (; r + 2 <= last; r += 2)
      score_runs<T, kQueries, 2>(query, tile.head_dim, runs.keys + r, rows + r * kRun);
  for (; r < last; ++r)
    score_runs<T, kQueries, 1>(query, tile.head_dim, runs.keys + r, rows + r * kRun);
}

// Scores of one query to weights: [low, high) are the tokens that it sees, of the partition. Gives
// back the largest score and the sum of the weights. kScaled: keys and values of a token have
// scales, and the weights get those of their values.
template <bool kScaled>
inline void weigh(float* scores, const Runs& runs, int first_run, int last_run, int low, int high, float softcap,
                  float& top, float& sum) {
  const Vec hidden = set1(-INFINITY);
  Vec best = hidden;
  for (int r = first_run; r < last_run; ++r) {
    float* at = scores + r * kRun;
    Vec x = load(at);
    if (kScaled) x = mul(x, load(runs.key_scales[r]));
    if (softcap > 0.0f)
      x = mul(set1(softcap), hyperbolic_tangent(div(x, set1(softcap))));
    const int from = std::clamp(low - r * kRun, 0, kRun), to = std::clamp(high - r * kRun, 0, kRun);
    if (from > 0 || to < kRun) x = keep(x, from, to, hidden);
    store(at, x);
    best = max(best, x);
  }
  top = max_lanes(best);
  const Vec base = set1(low < high ? top : 0.0f);
  Vec total = set1(0.0f);
  for (int r = first_run; r < last_run; ++r) {
    const Vec weight = exponential(sub(load(scores + r * kRun), base));
    store(scores + r * kRun, kScaled ? mul(weight, load(runs.value_scales[r])) : weight);
    total = add(total, weight);
  }
  sum = sum_lanes(total);
  if (low >= high) top = -INFINITY;
}

// Weighted values of kQueries queries and kColumns columns of 16 numbers over tokens [low, high).
template <class T, int kQueries, int kColumns>
inline void collect_columns(const float* weights, const T* const* tokens, int low, int high, int at,
                            int num_last, float* out, int64_t out_stride) {
  Vec sums[kQueries][kColumns];
#pragma GCC unroll 8
  for (int m = 0; m < kQueries; ++m)
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) sums[m][c] = set1(0.0f);
  for (int t = low; t < high; ++t) {
    const T* value = tokens[t] + at;
    Vec part[kColumns];
#pragma GCC unroll 8
    for (int c = 0; c + 1 < kColumns; ++c) part[c] = load(value + c * 16);
    const T* tail = value + (kColumns - 1) * 16;
    part[kColumns - 1] = num_last == 16 ? load(tail) : load_part(tail, num_last);
#pragma GCC unroll 8
    for (int m = 0; m < kQueries; ++m) {
      const Vec weight = set1(weights[m * kScoreStride + t]);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) sums[m][c] = accumulate(sums[m][c], weight, part[c]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kQueries; ++m)
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) store(out + m * out_stride + c * 16, sums[m][c]);
}

template <class T, int kQueries>
inline void collect(const Tile& tile, const T* const* tokens, int low, int high, int begin,
                    const float* weights, float* out) {
  constexpr int most = kAccumulators / kQueries;
  constexpr int wide = most >= 8 ? 8 : most;
  const int dim = tile.head_dim, out_stride = (dim + 15) / 16 * 16;
  const float* rows = weights + begin * kScoreStride;
  float* to = out + begin * out_stride;
  int at = 0;
  for (; at + wide * 16 <= dim; at += wide * 16)
    collect_columns<T, kQueries, wide>(rows, tokens, low, high, at, 16, to + at, out_stride);
  if constexpr (wide > 2)
    for (; at + 32 <= dim; at += 32)
      collect_columns<T, kQueries, 2>(rows, tokens, low, high, at, 16, to + at, out_stride);
  for (; at < dim; at += 16)
    collect_columns<T, kQueries, 1>(rows, tokens, low, high, at, std::min(16, dim - at), to + at,
                                    out_stride);
}

template <class T, int kQueries>
inline void attend_rows(const Tile& tile, const Runs& runs, const T* const* tokens, int first,
                        int low, int high, int begin, PartitionScratch& scratch,
                        Partial& partial) {
  const int first_run = low / kRun, last_run = (high + kRun - 1) / kRun;
  score<T, kQueries>(tile, runs, first_run, last_run, begin, scratch.scores);
  for (int m = begin; m < begin + kQueries; ++m) {
    const int known = std::min(m, tile.num_rows - 1);
    weigh<sizeof(T) == 1>(scratch.scores + m * kScoreStride, runs, first_run, last_run,
                          std::clamp(tile.low[known] - first, 0, kPartition),
                          std::clamp(tile.high[known] - first, 0, kPartition), tile.softcap,
                          partial.top[m], partial.sum[m]);
  }
  collect<T, kQueries>(tile, tokens, low, high, begin, scratch.scores, partial.values);
}

template <class T>
void attend_partition(const Tile& tile, const Runs& runs, int32_t first, int32_t stride,
                      PartitionScratch& scratch, Partial& partial) {
  int low = kPartition, high = 0;
  for (int m = 0; m < tile.num_rows; ++m) {
    low = std::min(low, std::max(tile.low[m] - first, 0));
    high = std::max(high, std::min(tile.high[m] - first, kPartition));
  }
  const T* tokens[kPartition];
  for (int t = low; t < high; ++t)
    tokens[t] = reinterpret_cast<const T*>(runs.values[t / kRun]) + int64_t{t % kRun} * stride;
  constexpr int step = kMaxQueries;
  for (int begin = 0; begin < tile.padded_rows; begin += step) {
    switch (std::min(step, tile.padded_rows - begin)) {
      case 1:
        attend_rows<T, 1>(tile, runs, tokens, first, low, high, begin, scratch, partial);
        break;
      case 2:
        attend_rows<T, 2>(tile, runs, tokens, first, low, high, begin, scratch, partial);
        break;
      case 4:
        attend_rows<T, 4>(tile, runs, tokens, first, low, high, begin, scratch, partial);
        break;
      default:
        if constexpr (step == 8)
          attend_rows<T, 8>(tile, runs, tokens, first, low, high, begin, scratch, partial);
    }
  }
}

void merge_partial(const Tile& tile, const Partial& partial, Partial& state, int32_t at) {
  const int width = (tile.head_dim + 15) / 16 * 16;
  for (int m = 0; m < tile.num_rows; ++m) {
    if (partial.top[m] == -INFINITY) continue;
    float& old_top = state.top[at + m];
    float& sum = state.sum[at + m];
    float* to = state.values + (at + m) * width;
    const float* from = partial.values + m * width;
    if (old_top == -INFINITY) {
      old_top = partial.top[m];
      sum = partial.sum[m];
      std::memcpy(to, from, width * sizeof(float));
      continue;
    }
    const float top = partial.top[m] > old_top ? partial.top[m] : old_top;
    const Vec old_share = exponential(set1(old_top - top));
    const Vec new_share = exponential(set1(partial.top[m] - top));
    alignas(64) float sums[16];
    store(sums, fma(set1(sum), old_share, mul(set1(partial.sum[m]), new_share)));
    old_top = top;
    sum = sums[0];
    for (int d = 0; d < width; d += 16)
      store(to + d, fma(load(to + d), old_share, mul(load(from + d), new_share)));
  }
}

void finish_query(const Tile& tile, const Partial& state, int32_t query, float* out) {
  const int width = (tile.head_dim + 15) / 16 * 16;
  const Vec sum = set1(state.sum[query]);
  for (int d = 0; d < tile.head_dim; d += 16)
    store_up_to(out + d, div(load(state.values + query * width + d), sum), tile.head_dim - d);
}
