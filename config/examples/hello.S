# A guest of one page, in 32-bit code: greets, echoes what is typed, knows a few words.
# It needs nothing but a serial port, so it runs on every KVM. Build with tools/assemble, that is
#   as --32 -o hello.o hello.S; ld -m elf_i386 -N -s -Ttext 0x100000 -o hello.elf hello.o
# The monitor enters it by the Multiboot protocol: protected mode, flat segments, paging off.

.intel_syntax noprefix
.code32
.globl _start

.set COM1, 0x3f8
.set LINE_MAX, 64

# Multiboot 0.6.96 §3.1: magic, flags (2: give me the memory map), checksum.
.align 4
.long 0x1BADB002, 2, -(0x1BADB002 + 2)

_start:
    cli
    mov esp, offset stack_top
    mov esi, [ebx + 4]              # mem_lower and mem_upper in KiB (flag 0 of the info)
    add esi, [ebx + 8]
    add esi, 1024 - 640 + 512       # the hole between them counts; round to the nearest
    shr esi, 10
    mov [megabytes], esi
    lgdt gdt_pointer
    ljmp 8, offset reload
reload:
    mov eax, 16
    mov ds, eax
    mov es, eax
    mov ss, eax

    # One interrupt gate for COM1: IRQ 4 becomes vector 0x24.
    mov eax, offset com1_interrupt
    mov word ptr idt + 0x24 * 8, ax
    shr eax, 16
    mov word ptr idt + 0x24 * 8 + 6, ax
    lidt idt_pointer

    # 8259: master at vector 0x20, slave at 0x28, only IRQ 4 open.
    mov al, 0x11
    out 0x20, al
    out 0xa0, al
    mov al, 0x20
    out 0x21, al
    mov al, 0x28
    out 0xa1, al
    mov al, 4
    out 0x21, al
    mov al, 2
    out 0xa1, al
    mov al, 1
    out 0x21, al
    out 0xa1, al
    mov al, 0xef
    out 0x21, al
    mov al, 0xff
    out 0xa1, al

    # 16550: 8n1, FIFO on, interrupt on received data, OUT2 connects it to the PIC.
    mov dx, COM1 + 3
    mov al, 3
    out dx, al
    mov dx, COM1 + 2
    mov al, 7
    out dx, al
    mov dx, COM1 + 4
    mov al, 0x0b
    out dx, al
    mov dx, COM1 + 1
    mov al, 1
    out dx, al

    mov esi, offset greeting
    call print
    mov eax, [megabytes]
    call print_number
    mov esi, offset greeting_end
    call print
    call prompt
    sti
idle:
    hlt
    jmp idle

com1_interrupt:
    pusha
drain:
    mov dx, COM1 + 5
    in al, dx
    test al, 1
    jz drained
    mov dx, COM1
    in al, dx
    call typed
    jmp drain
drained:
    mov al, 0x20
    out 0x20, al
    popa
    # IRET by hand: a KVM that emulates ring 0 may lack it. Flags first, without interrupts;
    # STI takes effect only after the jump.
    and dword ptr [esp + 8], ~0x200
    push dword ptr [esp + 8]
    popfd
    sti
    lret 4

# typed: one character from the console is in al.
typed:
    cmp al, 13
    je entered
    cmp al, 10
    je entered
    cmp al, 127
    je erase
    cmp al, 8
    je erase
    cmp al, 32
    jb ignored
    mov ecx, [line_length]
    cmp ecx, LINE_MAX
    jae ignored
    mov [input + ecx], al
    inc dword ptr [line_length]
    call put_char
ignored:
    ret
erase:
    cmp dword ptr [line_length], 0
    je ignored
    dec dword ptr [line_length]
    mov esi, offset rubout
    jmp print
entered:
    mov ecx, [line_length]
    mov byte ptr [input + ecx], 0
    mov dword ptr [line_length], 0
    mov esi, offset newline
    call print
    cmp byte ptr [input], 0
    je prompt
    mov ebx, offset commands
next_command:
    mov edi, [ebx]
    test edi, edi
    jz unknown
    mov esi, offset input
compare:
    mov al, [esi]
    cmp al, [edi]
    jne differs
    inc esi
    inc edi
    test al, al
    jnz compare
    call dword ptr [ebx + 4]
    jmp prompt
differs:
    add ebx, 8
    jmp next_command
unknown:
    mov esi, offset what
    call print
    mov esi, offset input
    call print
    mov esi, offset try_help
    call print
prompt:
    mov esi, offset prompt_text
    jmp print

help:
    mov esi, offset help_text
    jmp print
reboot:
    mov esi, offset rebooting
    call print
    mov al, 0xfe                    # 8042: pulse the reset line
    out 0x64, al
    hlt
poweroff:
    mov esi, offset bye
    call print
    mov dx, 0x604                   # ACPI PM1a_CNT: SLP_TYP 5, SLP_EN
    mov ax, 0x3400
    out dx, ax
    hlt
panic:
    mov esi, offset panicking
    call print
    lidt nothing                    # no IDT: the exception cannot be delivered, nor the double fault
    ud2

print:                              # esi: bytes up to a zero
    lodsb
    test al, al
    jz printed
    call put_char
    jmp print
printed:
    ret

print_number:                       # eax, decimal
    mov ecx, 10
    xor edx, edx
    div ecx
    push edx
    test eax, eax
    jz digit
    call print_number
digit:
    pop eax
    add al, 48
put_char:                                # al, once the transmitter has room
    push edx
    push eax
    mov dx, COM1 + 5
wait_room:
    in al, dx
    test al, 0x20
    jz wait_room
    mov dx, COM1
    pop eax
    out dx, al
    pop edx
    ret

.align 8
gdt:
    .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long gdt
.align 8
idt:                                # gates 0x00-0x23 stay empty: whatever they mean is a bug here
    .fill 0x24 * 8, 1, 0
    .word 0, 8, 0x8e00, 0
idt_pointer:
    .word idt_pointer - idt - 1
    .long idt
nothing:
    .word 0
    .long 0
commands:
    .long word_help, help, word_reboot, reboot, word_poweroff, poweroff, word_panic, panic, 0
megabytes:
    .long 0
line_length:
    .long 0
input:
    .fill LINE_MAX + 1, 1, 0

word_help:     .asciz "help"
word_reboot:   .asciz "reboot"
word_poweroff: .asciz "poweroff"
word_panic:    .asciz "panic"
greeting:      .asciz "\r\nHello from a guest of pyvmd with "
greeting_end:  .asciz " MiB of memory. Type help.\r\n"
prompt_text:   .asciz "hello> "
newline:       .asciz "\r\n"
rubout:        .asciz "\b \b"
what:          .asciz "hello does not know: "
try_help:      .asciz " (try help)\r\n"
help_text:     .asciz "help      this list\r\nreboot    reset the machine\r\npoweroff  end it\r\npanic     triple fault\r\n"
rebooting:     .asciz "rebooting\r\n"
bye:           .asciz "bye\r\n"
panicking:     .asciz "falling over\r\n"

.align 16
    .fill 1024, 1, 0
stack_top:
