# From the state that a boot loader leaves (32 bits, no paging) to main64 in 64 bits with AVX-512 enabled.

.section .multiboot, "a"
.align 4
.long 0x1BADB002, 3, -(0x1BADB002 + 3)

.section .text
.code32
.global _start
_start:
  mov $pages, %edi           # map the first GiB to itself, in pages of 2 MiB
  xor %ecx, %ecx
1:
  mov %ecx, %eax
  shl $21, %eax
  or $0x83, %eax
  mov %eax, (%edi, %ecx, 8)
  inc %ecx
  cmp $512, %ecx
  jne 1b
  movl $pages + 3, directory
  movl $directory + 3, top
  mov $0x40620, %eax         # OSXSAVE, OSXMMEXCPT, OSFXSR, PAE
  mov %eax, %cr4
  mov $top, %eax
  mov %eax, %cr3
  mov $0xC0000080, %ecx      # EFER: long mode
  rdmsr
  or $0x100, %eax
  wrmsr
  mov $0x80000013, %eax      # paging, protection, coprocessor
  mov %eax, %cr0
  lgdt table
  ljmp $8, $long_mode

.code64
long_mode:
  mov $16, %eax
  mov %eax, %ds
  mov %eax, %es
  mov %eax, %ss
  xor %ecx, %ecx             # XCR0: x87, SSE, AVX, and the three states of AVX-512
  xor %edx, %edx
  mov $0xE7, %eax
  xsetbv
  mov $stack, %rsp
  call main64
2:
  cli
  hlt
  jmp 2b

.section .data
.align 8
segments: .quad 0, 0x00AF9A000000FFFF, 0x00CF92000000FFFF
table: .word 23
  .long segments

.section .bss
.align 4096
top: .skip 4096
directory: .skip 4096
pages: .skip 4096
.skip 262144
.align 64
stack:

.section .note.GNU-stack, "", @progbits
