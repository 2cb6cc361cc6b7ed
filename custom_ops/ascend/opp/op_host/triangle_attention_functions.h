// What the operator's definition registers. Never compiled by CANN.
#pragma once

#include "exe_graph/runtime/infer_datatype_context.h"
#include "exe_graph/runtime/infer_shape_context.h"
#include "exe_graph/runtime/tiling_context.h"

namespace ge {

graphStatus InferTriangleAttentionShape(gert::InferShapeContext* context);
graphStatus InferTriangleAttentionType(gert::InferDataTypeContext* context);

}  // namespace ge

namespace optiling {

ge::graphStatus TileTriangleAttention(gert::TilingContext* context);

}  // namespace optiling
