# What stock kernels execute in ring 0 before they print a line, and some KVMs cannot emulate.
# Entered in 64-bit mode by vmm/probe.py, which holds these bytes; rsi and rdi point to zeroed,
# 64-byte aligned scratch memory, and vector 3 of the IDT points at `resume`.
.intel_syntax noprefix
.code64
    int3                            # kernels patch their own text with it
    cmpxchg16b [rsi]                # slab allocator
    mov rax, cr4
    bts rax, 18                     # CR4.OSXSAVE
    mov cr4, rax
    xor ecx, ecx
    mov eax, 3                      # x87 and SSE state
    xor edx, edx
    xsetbv
    xrstor [rdi]                    # every context switch
    mov al, 0x4b
    out 0xf4, al                    # vmm/probe.py waits for this
    hlt
resume:
    iretq
