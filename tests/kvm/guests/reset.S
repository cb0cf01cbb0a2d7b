# Resets once in each way there is, counting in memory, then ends: 8042, 0xCF9, triple fault.
# (The ACPI reset register is 0xCF9 as well.)
.include "common.inc"
    mov eax, [COUNTER]
    inc dword ptr [COUNTER]
    test eax, eax
    jz by_8042
    cmp eax, 1
    je by_cf9
    cmp eax, 2
    je by_triple_fault
    PRINT "three resets\n"
    EXIT 0x12
by_8042:
    PRINT "8042\n"
    mov al, 0xfe
    out 0x64, al
    EXIT 1
by_cf9:
    PRINT "cf9\n"
    mov dx, 0xcf9
    mov al, 2
    out dx, al
    mov al, 6
    out dx, al
    EXIT 1
by_triple_fault:
    PRINT "triple fault\n"
    lidt nothing
    ud2
nothing:
    .word 0
    .long 0
.fill 1024, 1, 0
bss_end:
