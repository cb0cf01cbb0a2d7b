# Plays a guest that is asked to go down. The last letter of its command line says which:
#   g  vmmci driver: acknowledges, then powers off or resets as it was asked
#   n  vmmci driver that never acknowledges       h  one that acknowledges and hangs
#   w  one that acknowledges another command      u  one that acknowledges and goes away
#   o  one that always resets, announcing it      l  one that resets again and again
#   j  like g, after writing commands that nobody asked for
#   s  announces unasked that it goes down, and halts
#   b  no driver: power button                    k  no driver: Ctrl-Alt-Del
# Anything else listens to nothing. It speaks on the serial port: "boot", "ready", and what comes.
.include "common.inc"
.set ISR, 19                        # offsets in the device's I/O BAR
.set STATUS, 18
.set COMMAND, 20
.set PM_STATUS, 0x600
.set PM_ENABLE, 0x602
.set PM_CONTROL, 0x604
.set POWER_BUTTON, 0x100

.macro SAY text
    mov esi, offset 910f
    call say
    jmp 911f
910: .asciz "\text"
911:
.endm

.macro WHEN letter, target
    cmp byte ptr [mode], \letter
    je \target
.endm

# Write eax to the command register.
.macro ANSWER
    mov edx, [io]
    add edx, COMMAND
    out dx, eax
.endm

    mov esi, [ebx + 16]             # command line, at its end
next_letter:
    lodsb
    test al, al
    jnz next_letter
    mov al, [esi - 2]
    mov [mode], al
    SAY "boot\n"
    cmp byte ptr [COUNTER], 'l'
    je by_8042
    GATE 0x21, keyboard
    GATE 0x29, power_button
    GATE 0x2a, vmmci
    mov dx, 0x4d1                   # ELCR: IRQ 9 and 10 are levels
    mov al, 6
    out dx, al
    PIC 0xfb                        # the second 8259; its lines are still masked
    WHEN 'b', want_button
    WHEN 'k', want_keyboard

    mov ecx, 0x80000000             # the slot of 0b5d:0777
next_slot:
    add ecx, 1 << 11
    mov dx, 0xcf8
    mov eax, ecx
    out dx, eax
    mov dx, 0xcfc
    in eax, dx
    cmp eax, 0x07770b5d
    je found
    cmp ecx, 0x80000000 | 31 << 11
    jb next_slot
    jmp deaf                        # vmmci: false
found:
    mov dx, 0xcf8
    lea eax, [ecx + 4]              # command: answer to I/O
    out dx, eax
    mov dx, 0xcfc
    mov ax, 1
    out dx, ax
    mov dx, 0xcf8
    lea eax, [ecx + 0x10]
    out dx, eax
    mov dx, 0xcfc
    in eax, dx
    and eax, ~3
    mov [io], eax
    mov edx, eax
    in eax, dx
    cmp eax, 7
    EXPECT "features"
    cmp byte ptr [mode], 'g'
    jb deaf
    mov edx, [io]                   # legacy initialisation: 0, ACKNOWLEDGE, DRIVER, DRIVER_OK
    add edx, STATUS
    mov al, 0
    out dx, al
    mov al, 1
    out dx, al
    mov al, 3
    out dx, al
    mov edx, [io]
    add edx, 4
    mov eax, 7
    out dx, eax
    mov edx, [io]
    add edx, STATUS
    mov al, 7
    out dx, al
    mov al, 0xfb                    # IRQ 10
    out 0xa1, al
    WHEN 's', announce
    cmp byte ptr [mode], 'j'
    jne deaf
    mov eax, 0
    ANSWER
    mov eax, 2
    ANSWER
    mov eax, 3
    ANSWER
    mov eax, 0xffffffff
    ANSWER
    jmp deaf
want_button:
    mov dx, PM_ENABLE
    mov ax, POWER_BUTTON
    out dx, ax
    mov al, 0xfd                    # IRQ 9
    out 0xa1, al
    jmp deaf
want_keyboard:
    mov al, 0xf9                    # IRQ 1, too
    out 0x21, al
deaf:
    SAY "ready\n"
    sti
idle:
    hlt
    jmp idle

announce:
    SAY "halts\n"
    mov eax, 1
    ANSWER
hang:
    cli
    hlt
    jmp hang

vmmci:                              # IRQ 10
    pusha
    mov edx, [io]
    add edx, ISR
    in al, dx
    test al, 2
    jz vmmci_done
    mov edx, [io]
    add edx, COMMAND
    in eax, dx
    mov ebx, eax
    cmp ebx, 3
    jne tell
    ANSWER                          # before it is told: who hears of it may cause another
tell:
    lea eax, [ebx + '0']
    mov [digit], al
    mov esi, offset command_text
    call say
    cmp ebx, 3
    je vmmci_done
    WHEN 'n', vmmci_done
    WHEN 'w', wrong
    mov eax, ebx
    ANSWER
    WHEN 'h', hang
    WHEN 'u', go_away
    WHEN 'o', reset_instead
    cmp ebx, 1
    je power_off
    mov al, [mode]
    mov [COUNTER], al
    jmp by_8042
wrong:
    mov eax, 3
    sub eax, ebx
    ANSWER
    jmp vmmci_done
go_away:
    mov edx, [io]
    add edx, STATUS
    mov al, 0
    out dx, al
    SAY "gone\n"
vmmci_done:
    jmp interrupt_done
reset_instead:
    mov eax, 1
    ANSWER
by_8042:
    mov al, 0xfe
    out 0x64, al
    jmp hang
power_off:
    mov dx, PM_CONTROL
    mov ax, 5 << 10 | 1 << 13
    out dx, ax
    jmp hang

power_button:                       # IRQ 9
    pusha
    mov dx, PM_STATUS
    mov ax, POWER_BUTTON
    out dx, ax
    SAY "button\n"
    jmp power_off

keyboard:                           # IRQ 1: Delete, with whatever, is enough
    pusha
    in al, 0x60
    cmp al, 0x53
    jne interrupt_done
    SAY "delete\n"
    jmp drain
still:
    in al, 0x60
drain:
    in al, 0x64
    test al, 1
    jnz still
    jmp by_8042

interrupt_done:
    mov al, 0x20
    out 0xa0, al
    out 0x20, al
    popa
    RETURN

say:                                # esi: bytes up to a zero, to the serial port
    mov dx, COM1
say_next:
    lodsb
    test al, al
    jz say_done
    out dx, al
    jmp say_next
say_done:
    ret

mode: .byte 0
io: .long 0
command_text: .ascii "command "
digit: .asciz "0\n"
.fill 1024, 1, 0
bss_end:
