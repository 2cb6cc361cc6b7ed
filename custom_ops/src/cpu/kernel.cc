#include "kernel.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <initializer_list>
#include <new>

namespace trianglemix::cpu {
namespace {

float Load(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  const uint32_t bits = static_cast<const uint16_t*>(data)[i];
  uint32_t out;
  float value;
  if (dtype == DType::kBFloat16) {
    out = bits << 16;
    std::memcpy(&value, &out, 4);
    return value;
  }
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31,
                 mantissa = bits & 1023;
  if (exponent == 31) {
    out = sign | 0x7f800000u | mantissa << 13;
  } else if (exponent != 0) {
    out = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {
    value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return sign != 0 ? -value : value;
  }
  std::memcpy(&value, &out, 4);
  return value;
}

void Store(void* data, DType dtype, int64_t i, float value) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[i] = value;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint16_t out;
  if (dtype == DType::kBFloat16) {
    out = std::isnan(value) ? 0x7fc0
                            : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  } else {
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const float magnitude = std::fabs(value);
    if (std::isnan(value)) {
      out = sign | 0x7e00;
    } else if (magnitude >= 65520.0f) {
      out = sign | 0x7c00;
    } else if (magnitude < 6.103515625e-5f) {
      out = sign | static_cast<uint16_t>(std::nearbyint(magnitude * 16777216.0f));
    } else {
      bits &= 0x7fffffff;
      out = sign | static_cast<uint16_t>((bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13);
    }
  }
  static_cast<uint16_t*>(data)[i] = out;
}

size_t ElementBytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

void Append(const TriangleProblem& p, int64_t b, int64_t g) {
  const int64_t end = int64_t{p.seqlens_k[b]} + 1;
  const int64_t start = end > p.query_length ? end - p.query_length : 0;
  for (bool is_value : {false, true}) {
    const size_t size = (is_value ? p.value_head_size : p.head_size) * ElementBytes(p.dtype);
    const char* past = static_cast<const char*>(is_value ? p.past_value : p.past_key);
    const char* fresh = static_cast<const char*>(is_value ? p.value : p.key);
    char* present = static_cast<char*>(is_value ? p.present_value : p.present_key);
    const bool in_place = past == present;
    const int64_t head = b * p.kv_num_heads + g;
    char* to = present + head * p.present_capacity * size;
    if (!in_place) {
      if (past != nullptr)
        std::memcpy(to, past + head * p.past_capacity * size, p.past_capacity * size);
      std::memset(to + p.past_capacity * size, 0, (p.present_capacity - p.past_capacity) * size);
    }
    for (int64_t s = 0; s < p.query_length && start + s < p.present_capacity; ++s)
      std::memcpy(to + (start + s) * size,
                  fresh + ((b * p.query_length + s) * p.kv_num_heads + g) * size, size);
  }
}

void Attend(const TriangleProblem& p, int64_t b, int64_t s, int64_t h) {
  const int64_t end = int64_t{p.seqlens_k[b]} + 1;
  const int64_t start = end > p.query_length ? end - p.query_length : 0;
  const int64_t i = start + s, D = p.head_size, Dv = p.value_head_size;
  const int64_t first = p.first_valid != nullptr ? p.first_valid[b] : 0;
  const int64_t prompt = p.prompt_length != nullptr ? p.prompt_length[b] : end;
  const int64_t head = b * p.kv_num_heads + h / (p.num_heads / p.kv_num_heads);
  const int64_t query = ((b * p.query_length + s) * p.num_heads + h) * D;
  float sums[256] = {}, row[256], total = 0, peak = -std::numeric_limits<float>::infinity();
  for (int64_t d = 0; d < D; ++d) row[d] = Load(p.query, p.dtype, query + d) * p.scale;
  for (int64_t j = first; j <= i && i < end; ++j) {
    const bool kept = j - first < p.pattern.sink || p.pattern.window == kDenseWindow ||
                      i - j < p.pattern.window || i >= prompt - p.pattern.last;
    if (!kept) continue;
    float score = 0;
    const int64_t key = (head * p.present_capacity + j) * D;
    for (int64_t d = 0; d < D; ++d) score += row[d] * Load(p.present_key, p.dtype, key + d);
    if (p.softcap != 0) score = p.softcap * std::tanh(score / p.softcap);
    const float next = score > peak ? score : peak;
    const float shrink = std::exp(peak - next), weight = std::exp(score - next);
    peak = next;
    total = total * shrink + weight;
    const int64_t value = (head * p.present_capacity + j) * Dv;
    for (int64_t d = 0; d < Dv; ++d)
      sums[d] = sums[d] * shrink + weight * Load(p.present_value, p.dtype, value + d);
  }
  const int64_t out = ((b * p.query_length + s) * p.num_heads + h) * Dv;
  for (int64_t d = 0; d < Dv; ++d)
    Store(p.output, p.dtype, out + d, total != 0 ? sums[d] / total : 0.0f);
}

}  // namespace

const char* Run(const TriangleProblem& problem, ParallelFor& pool) {
  const auto append = [](void* argument, size_t index) {
    const auto& p = *static_cast<const TriangleProblem*>(argument);
    Append(p, index / p.kv_num_heads, index % p.kv_num_heads);
  };
  const auto attend = [](void* argument, size_t index) {
    const auto& p = *static_cast<const TriangleProblem*>(argument);
    const int64_t i = static_cast<int64_t>(index);
    Attend(p, i / (p.num_heads * p.query_length), i / p.num_heads % p.query_length,
           i % p.num_heads);
  };
  void* argument = const_cast<TriangleProblem*>(&problem);
  if (const char* e = pool.Run(problem.batch * problem.kv_num_heads, append, argument)) return e;
  return pool.Run(problem.batch * problem.query_length * problem.num_heads, attend, argument);
}

}  // namespace trianglemix::cpu
