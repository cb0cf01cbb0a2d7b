# Starts every other CPU by INIT and SIPI, has each one report, and prints how many there are.
.include "common.inc"
.set LAPIC, 0xfee00000
.set TRAMPOLINE, 0x8000
    mov esi, offset trampoline
    mov edi, TRAMPOLINE
    mov ecx, offset trampoline_end - trampoline
    cld
    rep movsb
    mov dword ptr [LAPIC + 0xf0], 0x1ff     # spurious vector, APIC on
    mov dword ptr [LAPIC + 0x300], 0xc4500  # INIT, all but self
    mov ecx, 1000
    call pause
    mov dword ptr [LAPIC + 0x300], 0xc4608  # SIPI at page 8, all but self
    mov ecx, 20000                          # far more than a CPU needs to say hello
    call pause
    mov al, [cpus]
    add al, '0'
    mov dx, 0x402
    out dx, al
    mov al, 10
    out dx, al
    mov al, [cpus]
    add al, 0x20
    out 0xf4, al
    hlt
pause:                              # ecx port reads: each is an exit, so others get their turn
    mov dx, 0x80
pause_next:
    in al, dx
    loop pause_next
    ret
cpus: .byte 1
.code16
trampoline:                         # real mode at 0800:0000
    cli
    xor ax, ax
    mov ds, ax
    lgdtd cs:[trampoline_gdt - trampoline]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    ljmpd 8, offset ap
trampoline_gdt:
    .word 23
    .long gdt
trampoline_end:
.code32
ap:
    mov eax, 16
    mov ds, eax
    lock inc byte ptr [cpus]
ap_idle:
    hlt
    jmp ap_idle
.fill 1024, 1, 0
bss_end:
