/* ceilings_image.c - the machine code of ceilings.cu, for ceilings.c. */
__asm__(".section .rodata\n"
        ".globl ceilings_image\n"
        ".hidden ceilings_image\n"
        ".type ceilings_image, %object\n"
        ".balign 64\n"
        "ceilings_image:\n"
        ".incbin \"ceilings.fatbin\"\n"
        ".size ceilings_image, . - ceilings_image\n"
        ".text\n");
