#include "append.h"

#include <cstring>

#include "../tiles.h"
#include "cache.h"
#include "rotate.h"

namespace trianglemix::cpu {
namespace {

constexpr int64_t kChunkSlots = 256;
// Less than this is copied before a second thread has woken up.
constexpr int64_t kSmallBytes = 256 << 10;

// One of the two caches, in bytes: [B, S, G, row] is appended to [B, G, slots, row].
struct Cache {
  const char* fresh;
  int64_t token_bytes;  // from one new token to the next
  const char* past;
  char* present;
  int64_t row_bytes;
  bool rotates;

  bool in_place() const { return past == present; }
};

struct Work {
  const AttentionProblem& problem;
  Cache caches[2];
  bool in_place;
  int64_t chunks;  // of a head's slots
};

int64_t StartOf(const AttentionProblem& p, int64_t b) {
  return Larger(0, p.end(b) - p.query_length);
}

// Reads every token once, from front to back; each head has its own place to write.
void CopyNewTokens(const AttentionProblem& p, const Cache& cache, int64_t b,
                   const KeyRange& slots) {
  const int64_t token = b * p.query_length + slots.begin - StartOf(p, b);
  const char* from = cache.fresh + token * cache.token_bytes;
  for (int64_t slot = slots.begin; slot < slots.end; ++slot, from += cache.token_bytes) {
    for (int64_t g = 0; g < p.kv_num_heads; ++g) {
      const char* head = from + g * cache.row_bytes;
      char* to = cache.present + CacheRow(p, b, g, slot) * cache.row_bytes;
      if (cache.rotates)
        RotateHead(p, slot, head, to);
      else
        std::memcpy(to, head, cache.row_bytes);
    }
  }
}

// Queries that attention cannot read where they lie, into the output: [B, S, H*D].
void PrepareQueries(const AttentionProblem& p, int64_t b, const KeyRange& slots) {
  const int64_t element = BytesOf(p.dtype);
  const int64_t head = p.head_size * element;
  const int64_t token = b * p.query_length + slots.begin - StartOf(p, b);
  const char* from = static_cast<const char*>(p.query) + token * p.query_stride * element;
  char* to = static_cast<char*>(p.output) + token * p.num_heads * head;
  for (int64_t slot = slots.begin; slot < slots.end; ++slot, from += p.query_stride * element)
    for (int64_t h = 0; h < p.num_heads; ++h, to += head) RotateHead(p, slot, from + h * head, to);
}

// Slots that no new token goes to: the past's, and zeros behind it.
void CopyPast(const AttentionProblem& p, const Cache& cache, int64_t b, int64_t g,
              const KeyRange& slots) {
  const int64_t known = Clamp(p.past_capacity, slots.begin, slots.end);
  const int64_t head = b * p.kv_num_heads + g;
  char* to = cache.present + CacheRow(p, b, g, slots.begin) * cache.row_bytes;
  const int64_t bytes = (known - slots.begin) * cache.row_bytes;
  if (bytes > 0)
    std::memcpy(to, cache.past + (head * p.past_capacity + slots.begin) * cache.row_bytes, bytes);
  if (slots.end > known) std::memset(to + bytes, 0, (slots.end - known) * cache.row_bytes);
}

void AppendChunk(const Work& work, int64_t index) {
  const AttentionProblem& p = work.problem;
  const int64_t b = index / work.chunks;
  const int64_t start = StartOf(p, b);
  const int64_t begin = (work.in_place ? start : 0) + index % work.chunks * kChunkSlots;
  const int64_t end = Smaller(begin + kChunkSlots, p.present_capacity);
  const KeyRange fresh = {Clamp(start, begin, end), Clamp(start + p.query_length, begin, end)};
  for (const Cache& cache : work.caches) {
    for (int64_t g = 0; g < p.kv_num_heads && !cache.in_place(); ++g) {
      CopyPast(p, cache, b, g, {begin, fresh.begin});
      CopyPast(p, cache, b, g, {fresh.end, end});
    }
    CopyNewTokens(p, cache, b, fresh);
  }
  if (p.prepares_queries()) PrepareQueries(p, b, fresh);
}

}  // namespace

const char* Append(const AttentionProblem& p, ParallelFor& pool) {
  const int64_t element = BytesOf(p.dtype);
  const auto cache = [&](const void* fresh, int64_t stride, const void* past, void* present,
                         int64_t size, bool rotates) {
    return Cache{static_cast<const char*>(fresh), stride * element, static_cast<const char*>(past),
                 static_cast<char*>(present),     size * element,   rotates};
  };
  const Cache keys =
      cache(p.key, p.key_stride, p.past_key, p.present_key, p.head_size, p.rotation.cos != nullptr);
  const Cache values =
      cache(p.value, p.value_stride, p.past_value, p.present_value, p.value_head_size, false);
  const bool in_place = keys.in_place() && values.in_place();
  const int64_t slots = in_place ? p.query_length : p.present_capacity;  // looked at, of a head
  Work work{p, {keys, values}, in_place, CeilDivide(slots, kChunkSlots)};
  const int64_t count = p.batch * work.chunks;
  const int64_t row_bytes = keys.row_bytes + values.row_bytes;
  if (p.batch * p.kv_num_heads * slots * row_bytes < kSmallBytes) {
    for (int64_t i = 0; i < count; ++i) AppendChunk(work, i);
    return nullptr;
  }
  const auto body = [](void* argument, size_t index) {
    AppendChunk(*static_cast<const Work*>(argument), static_cast<int64_t>(index));
  };
  return pool.Run(count, body, &work);
}

AttentionProblem Appended(const AttentionProblem& problem) {
  return problem.prepares_queries() ? problem.with_prepared_queries() : problem;
}

}  // namespace trianglemix::cpu
