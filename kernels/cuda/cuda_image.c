/* cuda_image.c - the kernels' machine code, as the compiler of CMakeLists.txt left it, for cuda_backend.c. */
__asm__(".section .rodata\n"
        ".globl mlak_cuda_image\n"
        ".hidden mlak_cuda_image\n"
        ".type mlak_cuda_image, %object\n"
        ".balign 64\n"
        "mlak_cuda_image:\n"
        ".incbin \"mlak_cuda.fatbin\"\n"
        ".size mlak_cuda_image, . - mlak_cuda_image\n"
        ".text\n");
