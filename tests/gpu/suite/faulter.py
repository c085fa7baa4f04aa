"""A process whose kernel writes where nothing is mapped, on the GPU MLAD_DEVICE. Prints "fault: " and what the driver
said; ends with 1 if it said nothing. Under MPS the fault is every client's."""
import ctypes
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import driver  # noqa: E402

PTX = """.version 7.0
.target sm_80
.address_size 64

.visible .entry mlak_fault(.param .u64 where)
{
    .reg .b64 %address;
    .reg .b32 %value;
    ld.param.u64 %address, [where];
    mov.u32 %value, 1;
    st.global.u32 [%address], %value;
    ret;
}
"""
NOWHERE = 8     # no allocation lies on the first page
ROOM = 512      # of parameters: a driver takes 8 bytes of them, the fake one of the tests as many as our kernels have


def main():
    module, kernel, where = ctypes.c_void_p(), ctypes.c_void_p(), (ctypes.c_uint64 * ROOM)(NOWHERE)
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(where))
    driver.use(os.environ["MLAD_DEVICE"])
    driver.call("cuModuleLoadData", ctypes.byref(module), PTX.encode())
    driver.call("cuModuleGetFunction", ctypes.byref(kernel), module, b"mlak_fault")
    try:
        driver.call("cuLaunchKernel", kernel, 1, 1, 1, 1, 1, 1, 0, None, parameters, None)
        driver.call("cuCtxSynchronize")
    except driver.DriverError as error:
        print(f"fault: {error}", flush=True)
        return
    sys.exit("the driver reported no fault")


if __name__ == "__main__":
    try:
        main()
    except driver.DriverError as error:
        sys.exit(f"no fault, since {error}")
