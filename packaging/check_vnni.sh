#!/usr/bin/env bash
# Test the product compiled for AVX512-VNNI (int8_linear.cpp) in an emulator, on machines without such a CPU.
#
#     sudo apt install g++ bochs bochs-term isolinux syslinux-common xorriso    requirements
#     packaging/check_vnni.sh                                                   a minute; exit 0 if all is right
#
# It boots the product without an operating system, because Bochs 2.7 and Linux do not agree on the saved state of
# AVX-512. It does not measure speed.
set -euo pipefail
cd "$(dirname "$0")/vnni"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir -p "$folder/disc/isolinux"

# The flags of TARGETS["vnni"] in vllm_smoothquant/kernels/build.py, and those of a program without an operating system.
g++ -c -O3 -mavx512f -mavx512bw -mavx512vl -mavx512vnni -std=c++17 -ffreestanding -fno-exceptions -fno-rtti -fno-pie \
  -mno-red-zone -fno-threadsafe-statics -fno-stack-protector -fno-asynchronous-unwind-tables -fcf-protection=none \
  main.cpp -o "$folder/main.o"
g++ -c start.S -o "$folder/start.o"
ld -n --no-warn-rwx-segments -T link.ld -o "$folder/check" "$folder/start.o" "$folder/main.o"
objcopy -O elf32-i386 "$folder/check" "$folder/disc/check.elf"

cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/{ldlinux,libcom32,mboot}.c32 "$folder/disc/isolinux"
printf 'DEFAULT check\nLABEL check\nKERNEL mboot.c32\nAPPEND /check.elf\n' > "$folder/disc/isolinux/isolinux.cfg"
xorriso -as mkisofs -quiet -o "$folder/disc.iso" -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot \
  -boot-load-size 4 -boot-info-table "$folder/disc"

cat > "$folder/bochsrc" <<BOCHS
display_library: term
cpu: model=corei7_icelake_u, ips=100000000
memory: guest=128, host=128
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path=$folder/disc.iso, status=inserted
boot: cdrom
port_e9_hack: enabled=1
log: $folder/log
clock: sync=none
BOCHS
echo c > "$folder/commands"  # Debian's Bochs is a debugger, which waits for the command "c" (continue)
TERM=xterm timeout --signal=KILL 300 script -fqc "exec bochs -q -f $folder/bochsrc -rc $folder/commands" /dev/null \
  < /dev/null > "$folder/screen" 2>&1 &
while kill -0 $! 2> /dev/null && ! grep -aq "wrong outputs: [0-9]*;" "$folder/screen"; do sleep 1; done
pkill -KILL -f "$folder/bochsrc" || true
grep -ao "VNNI: .*;" "$folder/screen"
grep -aq "VNNI: 1; products: 1680; wrong outputs: 0;" "$folder/screen"
