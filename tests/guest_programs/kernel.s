# A Linux kernel as far as a boot loader can tell (bzImage, boot protocol 2.6) that never leaves its real-mode part. It says
#     kernel LABEL
#     cmdline TEXT
#     initrd SIZE FIRST 16 BYTES       or: initrd none
# (SIZE in hex; unprintable bytes as dots) and halts. Offsets below are the protocol's own.
        .code16
        .intel_syntax noprefix
        .global start
start:  .org    0x1f1
        .byte   4                       # sectors of this part besides the first
        .word   0
        .long   1                       # size of the rest in paragraphs
        .word   0, 0, 0
        .word   0xaa55
        jmp     short begin
        .ascii  "HdrS"
        .word   0x0206                  # protocol version
        .long   0
        .word   0, 0
        .byte   0
        .byte   1                       # the rest belongs at 100000
        .word   0
        .long   0x100000
initrd: .long   0
initrd_size: .long 0
        .long   0
        .word   0
        .word   0
cmdline: .long  0
        .long   0x7fffffff              # the initrd may lie anywhere
        .long   0
        .byte   0, 0, 0, 0
        .long   2047                    # the longest command line

        # The loader comes in at offset 200 with CS 20 paragraphs above this file, DS at it.
begin:  mov     ax, cs
        sub     ax, 0x20
        mov     ds, ax
        cld
        sti
        mov     si, offset text
        call    puts
        mov     si, offset label
        call    puts
        call    newline
        mov     si, offset cmdlines
        call    puts
        mov     eax, [cmdline]
        push    ds
        mov     si, ax
        and     si, 15
        shr     eax, 4
        mov     ds, ax
        call    puts
        pop     ds
        call    newline
        mov     si, offset initrds
        call    puts
        mov     eax, [initrd_size]
        test    eax, eax
        jz      none
        ror     eax, 16
        call    hex16
        ror     eax, 16
        call    hex16
        mov     al, ' '
        call    putc
        mov     eax, [initrd]           # too far up for us; the BIOS can copy it down
        mov     [from], ax
        shr     eax, 16
        mov     [from + 2], al
        mov     [from + 5], ah
        mov     ax, ds
        mov     es, ax
        mov     si, offset table
        mov     cx, 8                   # words
        mov     ah, 0x87
        int     0x15
        mov     cx, 16
        cmp     dword ptr [initrd_size], 16
        jae     1f
        mov     cx, [initrd_size]
1:      push    ds
        push    0x3000
        pop     ds
        xor     si, si
2:      lodsb
        cmp     al, ' '
        jb      3f
        cmp     al, 0x7f
        jb      4f
3:      mov     al, '.'
4:      call    putc
        loop    2b
        pop     ds
        jmp     end
none:   mov     si, offset nothing
        call    puts
end:    call    newline
        cli
1:      hlt
        jmp     1b

        .include "serial.inc"

        .balign 8
table:  .quad   0, 0                    # descriptors as INT 15 function 87 wants them
        .word   0xffff
from:   .word   0                       # base, its four bytes in two places
        .byte   0, 0x93, 0, 0
        .word   0xffff, 0
        .byte   3, 0x93, 0, 0           # to 3000:0
        .quad   0, 0
text:   .asciz  "kernel "
cmdlines: .asciz "cmdline "
initrds: .asciz "initrd "
nothing: .asciz "none"
label:                                  # the label follows
