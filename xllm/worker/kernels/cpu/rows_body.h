// The row kernels for one variant of Vec; included behind vector_math.h.

void rms_norm(const float* x, const float* weight, float eps, int32_t n, float* out) {
  Vec sums[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  for (int32_t i = 0; i < n; i += 16) {
    const Vec part = load_up_to(x + i, n - i);
    sums[i / 16 % 4] = fma(part, part, sums[i / 16 % 4]);
  }
  const float sum = sum_lanes(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  const Vec factor = set1(1.0f / std::sqrt(sum / static_cast<float>(n) + eps));
  for (int32_t i = 0; i < n; i += 16) {
    const Vec scaled = mul(load_up_to(x + i, n - i), factor);
    store_up_to(out + i, mul(scaled, load_up_to(weight + i, n - i)), n - i);
  }
}

// The two halves of the first `dim` numbers are the coordinates of pairs.
inline void rotate(float* head, int32_t dim, const float* cos, const float* sin) {
  const int32_t half = dim / 2;
  for (int32_t i = 0; i < half; i += 16) {
    const int32_t n = half - i;
    const Vec x = load_up_to(head + i, n), y = load_up_to(head + half + i, n);
    const Vec c = load_up_to(cos + i, n), s = load_up_to(sin + i, n);
    store_up_to(head + i, sub(mul(x, c), mul(y, s)), n);
    store_up_to(head + half + i, add(mul(y, c), mul(x, s)), n);
  }
}

inline void put(float value, Bf16* to) { *to = to_bf16(value); }
inline void put(float value, float* to) { *to = value; }

template <class T>
inline void write_numbers(const KvLayout& layout, const float* k, const float* v, char* layer,
                          int32_t offset) {
  const int64_t dim = layout.head_dim, block = layout.block_size;
  T* keys = reinterpret_cast<T*>(layer) + offset / kRun * dim * kRun + offset % kRun;
  T* values = reinterpret_cast<T*>(layer) + layout.num_kv_heads * block * dim + offset * dim;
  for (int32_t head = 0; head < layout.num_kv_heads; ++head) {
    int64_t d = 0;
    for (; d + 16 <= dim; d += 16) {
      alignas(64) T column[16];  // rounded together, then stored one by one
      store(column, load(k + d));
      for (int i = 0; i < 16; ++i) keys[(d + i) * kRun] = column[i];
      store(values + d, load(v + d));
    }
    for (; d < dim; ++d) put(k[d], keys + d * kRun), put(v[d], values + d);
    k += dim, v += dim, keys += block * dim, values += block * dim;
  }
}

// `dim` numbers to bytes `stride` apart, times what is given back; NaN where one is not finite.
inline float round_head(const float* x, int64_t dim, int64_t stride, int8_t* to) {
  uint32_t most = 0;
  for (int64_t d = 0; d < dim; ++d) {
    uint32_t bits;
    std::memcpy(&bits, x + d, 4);
    bits &= 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  float top;
  std::memcpy(&top, &most, 4);
  const bool usual = top >= 1e-30f && top < INFINITY;
  const float factor = usual ? 127.0f / top : 0.0f;
  for (int64_t d = 0; d < dim; ++d) {
    const float shifted = (usual ? x[d] * factor : 0.0f) + 12582912.0f;  // 1.5 * 2^23: rounds
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    to[d * stride] = static_cast<int8_t>(bits - 0x4b400000);
  }
  return usual ? top / 127.0f : top < 1e-30f ? 0.0f : NAN;
}

inline void write_rounded(const KvLayout& layout, const float* k, const float* v, char* layer,
                          int32_t offset) {
  const int64_t dim = layout.head_dim, block = layout.block_size, heads = layout.num_kv_heads;
  auto* keys = reinterpret_cast<int8_t*>(layer) + offset / kRun * dim * kRun + offset % kRun;
  auto* values = reinterpret_cast<int8_t*>(layer) + heads * block * dim + offset * dim;
  auto* scales = reinterpret_cast<float*>(layer + 2 * heads * block * dim) + offset;
  for (int64_t head = 0; head < heads; ++head) {
    scales[head * block] = round_head(k, dim, kRun, keys);
    scales[(heads + head) * block] = round_head(v, dim, 1, values);
    k += dim, v += dim, keys += block * dim, values += block * dim;
  }
}

void write_row(const KvLayout& layout, const float* k, const float* v, char* layer,
               int32_t offset) {
  if (layout.kind == kKvInt8)
    write_rounded(layout, k, v, layer, offset);
  else if (layout.kind == kKvBf16)
    write_numbers<Bf16>(layout, k, v, layer, offset);
  else
    write_numbers<float>(layout, k, v, layer, offset);
}

void split_row(const HeadShape& shape, const KvLayout& layout, float* qkv, const float* cos,
               const float* sin, float* q, char* layer, int32_t offset) {
  const int64_t dim = shape.head_dim;
  const int32_t count = shape.num_heads + shape.num_kv_heads;
  for (int32_t h = 0; h < count; ++h) {
    float* head = qkv + h * dim;
    const float* norm = h < shape.num_heads ? shape.q_norm : shape.k_norm;
    if (norm != nullptr) rms_norm(head, norm, shape.eps, shape.head_dim, head);
    if (shape.rotary_dim > 0) rotate(head, shape.rotary_dim, cos, sin);
  }
  if (q != qkv) std::memcpy(q, qkv, shape.num_heads * dim * sizeof(float));
  const float* k = qkv + shape.num_heads * dim;
  write_row(layout, k, k + shape.num_kv_heads * dim, layer, offset);
}

// Rows are scanned by pieces whose best is looked up again only where it beats the best so far.
float arg_max(const float* x, int32_t n, int32_t* place) {
  constexpr int32_t piece = 1024;
  float best = -INFINITY;
  int32_t found = 0;
  *place = 0;
  Vec strange = set1(0.0f);  // becomes NaN with the first NaN or infinity
  for (int32_t begin = 0; begin < n; begin += piece) {
    const int32_t size = std::min(piece, n - begin);
    Vec top = set1(-INFINITY);
    int32_t i = 0;
    for (; i + 16 <= size; i += 16) {
      const Vec part = load(x + begin + i);
      top = max(top, part);
      strange = fma(part, set1(0.0f), strange);
    }
    float most = max_lanes(top);
    for (; i < size; ++i) {
      most = x[begin + i] > most ? x[begin + i] : most;
      strange = fma(set1(x[begin + i]), set1(0.0f), strange);
    }
    if (most > best) best = most, found = begin;
  }
  if (sum_lanes(strange) != 0.0f) {
    for (int32_t i = 0; i < n; ++i)
      if (x[i] != x[i]) return x[i];
  }
  for (int32_t i = found; i < n; ++i)
    if (x[i] == best) {
      *place = i;
      break;
    }
  return best;
}
