/* gates_image.c - the machine code of mlac_gates.cu, as the compiler of CMakeLists.txt left it, for streams.c. */
__asm__(".section .rodata\n"
        ".globl mlac_gates_image\n"
        ".hidden mlac_gates_image\n"
        ".type mlac_gates_image, %object\n"
        ".balign 64\n"
        "mlac_gates_image:\n"
        ".incbin \"mlac_gates.fatbin\"\n"
        ".size mlac_gates_image, . - mlac_gates_image\n"
        ".text\n");
