#include "append.h"

#include <cstring>

#include "../tiles.h"

namespace trianglemix::cpu {
namespace {

constexpr int64_t kChunkSlots = 256;
// Less than this is copied before a second thread has woken up.
constexpr int64_t kSmallBytes = 256 << 10;

// One of the two caches, in bytes: [B, S, G, row] is appended to [B, G, slots, row].
struct Cache {
  const char* fresh;
  const char* past;
  char* present;
  int64_t row_bytes;

  bool in_place() const { return past == present; }
};

struct Work {
  const TriangleProblem& problem;
  Cache caches[2];
  bool in_place;
  int64_t slots;   // of a head that are looked at
  int64_t chunks;  // of them
};

int64_t StartOf(const TriangleProblem& p, int64_t b) {
  return Larger(0, int64_t{p.seqlens_k[b]} + 1 - p.query_length);
}

// Reads every token once, from front to back; each head has its own place to write.
void CopyNewTokens(const TriangleProblem& p, const Cache& cache, int64_t b, const KeyRange& slots) {
  const int64_t head_bytes = p.present_capacity * cache.row_bytes;
  const int64_t token = b * p.query_length + slots.begin - StartOf(p, b);
  const char* from = cache.fresh + token * p.kv_num_heads * cache.row_bytes;
  char* to = cache.present + b * p.kv_num_heads * head_bytes + slots.begin * cache.row_bytes;
  for (int64_t slot = slots.begin; slot < slots.end; ++slot, to += cache.row_bytes)
    for (int64_t g = 0; g < p.kv_num_heads; ++g, from += cache.row_bytes)
      std::memcpy(to + g * head_bytes, from, cache.row_bytes);
}

// Slots that no new token goes to: the past's, and zeros behind it.
void CopyPast(const TriangleProblem& p, const Cache& cache, int64_t head, const KeyRange& slots) {
  const int64_t known = Clamp(p.past_capacity, slots.begin, slots.end);
  char* to = cache.present + (head * p.present_capacity + slots.begin) * cache.row_bytes;
  const int64_t bytes = (known - slots.begin) * cache.row_bytes;
  if (bytes > 0)
    std::memcpy(to, cache.past + (head * p.past_capacity + slots.begin) * cache.row_bytes, bytes);
  if (slots.end > known) std::memset(to + bytes, 0, (slots.end - known) * cache.row_bytes);
}

void AppendChunk(const Work& work, int64_t index) {
  const TriangleProblem& p = work.problem;
  const int64_t b = index / work.chunks;
  const int64_t start = StartOf(p, b);
  const int64_t begin = (work.in_place ? start : 0) + index % work.chunks * kChunkSlots;
  const int64_t end = Smaller(begin + kChunkSlots, p.present_capacity);
  const KeyRange fresh = {Clamp(start, begin, end), Clamp(start + p.query_length, begin, end)};
  for (const Cache& cache : work.caches) {
    for (int64_t g = 0; g < p.kv_num_heads && !cache.in_place(); ++g) {
      CopyPast(p, cache, b * p.kv_num_heads + g, {begin, fresh.begin});
      CopyPast(p, cache, b * p.kv_num_heads + g, {fresh.end, end});
    }
    CopyNewTokens(p, cache, b, fresh);
  }
}

Cache MakeCache(const void* fresh, const void* past, void* present, int64_t row_bytes) {
  return {static_cast<const char*>(fresh), static_cast<const char*>(past),
          static_cast<char*>(present), row_bytes};
}

}  // namespace

const char* Append(const TriangleProblem& p, ParallelFor& pool) {
  const int64_t element = p.dtype == DType::kFloat32 ? 4 : 2;
  Work work{p,
            {MakeCache(p.key, p.past_key, p.present_key, p.head_size * element),
             MakeCache(p.value, p.past_value, p.present_value, p.value_head_size * element)},
            false,
            0,
            0};
  work.in_place = work.caches[0].in_place() && work.caches[1].in_place();
  work.slots = work.in_place ? p.query_length : p.present_capacity;
  work.chunks = CeilDivide(work.slots, kChunkSlots);
  const int64_t count = p.batch * work.chunks;
  const int64_t row_bytes = work.caches[0].row_bytes + work.caches[1].row_bytes;
  if (p.batch * p.kv_num_heads * work.slots * row_bytes < kSmallBytes) {
    for (int64_t i = 0; i < count; ++i) AppendChunk(work, i);
    return nullptr;
  }
  const auto body = [](void* argument, size_t index) {
    AppendChunk(*static_cast<const Work*>(argument), static_cast<int64_t>(index));
  };
  return pool.Run(count, body, &work);
}

}  // namespace trianglemix::cpu
