# An option ROM that says "rom LABEL" when the BIOS starts it, and goes back. Length and checksum are filled in later.
        .code16
        .intel_syntax noprefix
        .global start
start:  .byte   0x55, 0xaa, 0
        pushf                           # the BIOS enters here, by a far call
        pusha
        push    ds
        push    cs
        pop     ds
        cld
        mov     si, offset text
        call    puts
        mov     si, offset label
        call    puts
        call    newline
        pop     ds
        popa
        popf
        retf
        .include "serial.inc"
text:   .asciz  "rom "
label:                                  # the label follows
