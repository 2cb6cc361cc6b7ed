// Stand-in for CANN's header of the same name: a 910B3.
#pragma once

#include <cstddef>
#include <cstdint>

namespace platform_ascendc {

enum class CoreMemType { L0_A = 0, L0_B = 1, L0_C = 2, L1 = 3, L2 = 4, UB = 5 };

class PlatformAscendC {
 public:
  explicit PlatformAscendC(void*) {}
  uint32_t GetCoreNumAic() const { return 20; }
  uint32_t GetLibApiWorkSpaceSize() const { return 16 * 1024 * 1024; }
  void GetCoreMemSize(const CoreMemType& type, uint64_t& size) const {
    static const uint64_t kib[] = {64, 64, 128, 512, 0, 192};
    size = kib[static_cast<int>(type)] * 1024;
  }
};

}  // namespace platform_ascendc
