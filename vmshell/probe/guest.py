"""The probe guest: one boot sector that does what a Linux kernel does first, and says on the serial port how far it came.

A /dev/kvm that opens proves nothing, and neither does a guest that prints from real mode: on some hosts KVM runs that much by
emulating every instruction, and then stops, or starts anew for ever, where a kernel enters long mode or its first user process.
So the sector goes all the way: `1` real mode, `2` protected mode, `3` paging and long mode, `4` an exception and back, `5` ring 3
(two million turns of a loop) and back by syscall, and `V`, again and again, once a timer interrupt has ended `hlt`.

SOURCE is the assembly, CODE what GNU as makes of it (`tests/unit/test_probe.py` assembles it anew where as is installed).
Runs in: the guest. As a module: the probe.
"""

from __future__ import annotations

DONE = b"V"
START = b"1"
STAGES = {
    "1": "real mode",
    "2": "protected mode",
    "3": "long mode",
    "4": "its first exception",
    "5": "its first system call",
}

SOURCE = r"""
        .set COM1, 0x3f8
        .set TABLES, 0x10000            # 16 KiB: PML4, PDPT, PD, IDT
        .set IDT, TABLES + 0x3000
        .set CODE32, 0x08
        .set DATA, 0x10
        .set CODE64, 0x18               # the order from here on is what syscall and sysret want
        .macro say char
        mov $\char, %al
        mov $COM1, %dx
        out %al, %dx
        .endm

        .code16
        .global _start
_start: cli
        xor %ax, %ax
        mov %ax, %ds
        mov %ax, %ss
        mov $0x7c00, %esp
        say '1'                         # real mode
        lgdtl gdtr
        mov %cr0, %eax
        and $0x9fffffff, %eax           # caches on
        or $1, %al
        mov %eax, %cr0
        ljmpl $CODE32, $protected

        .code32
protected:
        mov $DATA, %ax
        mov %ax, %ds
        mov %ax, %es
        mov %ax, %ss
        say '2'                         # protected mode
        mov $TABLES, %edi
        mov %edi, %cr3
        xor %eax, %eax
        mov $0x1000, %ecx
        rep stosl
        movl $TABLES + 0x1007, TABLES   # one page of 2 MiB, open to ring 3
        movl $TABLES + 0x2007, TABLES + 0x1000
        movl $0x87, TABLES + 0x2000
        mov $0x620, %eax                # PAE, OSFXSR, OSXMMEXCPT
        mov %eax, %cr4
        mov $0xc0000080, %ecx           # EFER: SCE, LME
        rdmsr
        or $0x101, %eax
        wrmsr
        mov %cr0, %eax
        or $0x80000002, %eax            # PG, MP
        mov %eax, %cr0
        ljmpl $CODE64, $long

        .code64
long:   say '3'                         # paging and long mode
        lidt idtr
        movl $(CODE64 << 16) + invalid, IDT + 6 * 16
        movl $0x8e00, IDT + 6 * 16 + 4
        ud2
        say '4'                         # an exception and back
        mov $0xc0000081, %ecx           # STAR
        xor %eax, %eax
        mov $0x00200018, %edx
        wrmsr
        inc %ecx                        # LSTAR
        mov $kernel, %eax
        xor %edx, %edx
        wrmsr
        mov $user, %ecx
        mov $2, %r11d
        sysretq
user:   mov $2000000, %ecx              # milliseconds on a CPU, seconds in an emulator that is called CPU
1:      dec %ecx
        jnz 1b
        movd %ecx, %xmm0
        syscall
kernel: say '5'                         # ring 3 and back
        xor %eax, %eax
        cpuid
        swapgs
        mov %cr3, %rax
        mov %rax, %cr3
        movl $(CODE64 << 16) + tick, IDT + 8 * 16
        movl $0x8e00, IDT + 8 * 16 + 4
        mov $0xfe, %al                  # only the timer's line, where the BIOS left it: vector 8
        out %al, $0x21
        mov $0xff, %al
        out %al, $0xa1
        sti
        hlt
        cli
2:      say 'V'                         # a timer interrupt ended hlt: all is well, said until someone listens
        mov $10000000, %ecx
3:      dec %ecx
        jnz 3b
        jmp 2b
invalid:
        addq $2, (%rsp)                 # past ud2
tick:   iretq

        .align 8
gdt:    .quad 0
        .quad 0x00cf9b000000ffff        # CODE32
        .quad 0x00cf93000000ffff        # DATA
        .quad 0x00af9b000000ffff        # CODE64
        .quad 0x00cf93000000ffff        # data, for syscall
        .quad 0x00cff3000000ffff        # data of ring 3
        .quad 0x00affb000000ffff        # code of ring 3
gdtr:   .word gdtr - gdt - 1
        .long gdt
idtr:   .word 9 * 16 - 1
        .quad IDT
        .org 510
        .word 0xaa55
"""

CODE = bytes.fromhex(
    """
    fa31c08ed88ed066bc007c0000b031baf803ee660f0116887d0f20c06625ffffff9f0c010f22c066ea2f7c0000080066
    b810008ed88ec08ed0b03266baf803eebf000001000f22df31c0b900100000f3abc7050000010007100100c705001001
    0007200100c7050020010087000000b8200600000f22e0b9800000c00f320d010100000f300f20c00d020000800f22c0
    ea977c00001800b03366baf803ee0f011c258e7d0000c7042560300100427d1800c7042564300100008e00000f0bb034
    66baf803eeb9810000c031c0ba180020000f30ffc1b8fb7c000031d20f30b9ec7c000041bb02000000480f07b980841e
    00ffc975fc660f6ec10f05b03566baf803ee31c00fa20f01f80f20d80f22d8c7042580300100477d1800c70425843001
    00008e0000b0fee621b0ffe6a1fbf4fab05666baf803eeb980969800ffc975fcebee488304240248cf0f1f8000000000
    0000000000000000ffff0000009bcf00ffff00000093cf00ffff0000009baf00ffff00000093cf00ffff000000f3cf00
    ffff000000fbaf003700507d00008f00003001
    """
)

# One MiB, nearly all a hole: the BIOS reads no disk smaller than a cylinder.
DISK_SIZE = 1 << 20
SECTOR = CODE.ljust(510, b"\0") + b"\x55\xaa"
