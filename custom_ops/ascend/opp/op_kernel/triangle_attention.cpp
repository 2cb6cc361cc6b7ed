// The kernel's entry: one cube core and two vector cores work on each tile together.
// Never compiled by CANN.
#define TRIANGLEMIX_HOST_DEVICE __aicore__

#include "triangle_attention_cube.h"
#include "triangle_attention_vector.h"

// DTYPE_QUERY is the type of `query`: half or bfloat16_t. The build defines it.
extern "C" __global__ __aicore__ void triangle_attention(
    GM_ADDR query, GM_ADDR key, GM_ADDR value, GM_ADDR past_key, GM_ADDR past_value,
    GM_ADDR seqlens_k, GM_ADDR total_sequence_length, GM_ADDR prompt_length, GM_ADDR first_valid,
    GM_ADDR output, GM_ADDR present_key, GM_ADDR present_value, GM_ADDR workspace, GM_ADDR tiling) {
  REGISTER_TILING_DEFAULT(TriangleAttentionTilingData);
  GET_TILING_DATA(data, tiling);
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2);
  GM_ADDR ours = AscendC::GetUserWorkspace(workspace);
  if (ours == nullptr) return;
  const triangle::Addresses at = {query,      key,         value,         past_key,
                                  past_value, seqlens_k,   prompt_length, first_valid,
                                  output,     present_key, present_value, ours};
  const triangle::Call<DTYPE_QUERY> call(at, data);
  AscendC::TPipe pipe;
  if ASCEND_IS_AIC {
    triangle::CubeCore<DTYPE_QUERY> core(call, pipe);
    core.Process();
  }
  if ASCEND_IS_AIV {
    triangle::VectorCore<DTYPE_QUERY> core(call, pipe);
    core.Process();
  }
}
