/* cuda_image.c - the kernels' machine code, as the compiler of CMakeLists.txt left it, for cuda_backend.c and
 * cuda_ordered.c. */
#define IMAGE(name)                                                                                                    \
    __asm__(".section .rodata\n"                                                                                       \
            ".globl " #name "_image\n"                                                                                 \
            ".hidden " #name "_image\n"                                                                                \
            ".type " #name "_image, %object\n"                                                                         \
            ".balign 64\n" #name "_image:\n"                                                                           \
            ".incbin \"" #name ".fatbin\"\n"                                                                           \
            ".size " #name "_image, . - " #name "_image\n"                                                             \
            ".text\n")
IMAGE(mlak_cuda);
IMAGE(mlak_order);
