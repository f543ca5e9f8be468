#!/usr/bin/env bash
# usage: bash scripts/kernels.sh [arm] [vnni]
#
# Compares the kernels of instruction sets that this machine lacks, bit for bit, over random and
# hostile inputs (tests/native). Takes about two minutes of two cores; without arguments, both:
#   arm   NEON with dotprod and i8mm against code without intrinsics, compiled for aarch64 and run in
#         QEMU, where the choice of the set is tried on three processors, too. Installs Debian's
#         qemu-user and cross compiler as root where they are missing.
#   vnni  AVX-VNNI against AVX2. Its two instructions are assembled in the form of AVX-512, which is
#         the same arithmetic on the same registers, where the machine has that and not AVX-VNNI.
# What cannot run here says so in one line and is skipped. FORMATS=all takes all of GGUF's types.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
help_of "$0" "${1:-}"
cd "$(dirname "$0")/.."
build=build/kernels
mkdir -p $build
flags=(-std=c++20 -O1 -Wall -Wextra -ffp-contract=off -Inative -Itests/native)
sources=(blocks few_read grouped kernels head_screen packed_cache rows_of_codes sparse top_k)
few='USE(Q4_0,q4_0) USE(Q8_0,q8_0) USE(Q2K,q2_k) USE(Q3K,q3_k) USE(Q5K,q5_k) USE(Q6K,q6_k)'
few="$few USE(Tq1_0,tq1_0)"
groups='USE(3,group3,PlainScales<3>) USE(8,group8_zero,ZeroScales<8>)'
groups="$groups USE(5,nested5_zero,NestedZeros<5>) USE(4,levels4,NestedLevels<4>)"
[ "${FORMATS:-}" = all ] || flags+=("-DGGUF_FORMATS(USE)=$few" "-DGROUP_FORMATS(USE)=$groups")

# jobs   runs lines of its input, two at a time
jobs() { tr '\n' '\0' | xargs -0 -P 2 -I {} bash -c {}; }

# compile COMPILER FOLDER ISA FLAG...   prints commands that compile one set's kernels
compile() {
  local compiler=$1 folder=$2 isa=$3 source
  shift 3
  for source in "${sources[@]}"; do
    printf '%q ' "$compiler" "${flags[@]}" "$@" "-DPACELINE_ISA=$isa" -c \
      "native/kernels/$source.cpp" -o "$folder/$isa.$source.o"
    echo
  done
}

# check_program COMPILER FOLDER ISA...   prints commands that compile the comparison of these sets
check_program() {
  local compiler=$1 folder=$2 source
  shift 2
  for source in kernel_check check_products check_attention check_rows; do
    printf '%q ' "$compiler" "${flags[@]}" "-DCHECKED(USE)=$(printf 'USE(%s) ' "$@")" -c \
      "tests/native/$source.cpp" -o "$folder/$source.o"
    echo
  done
}

install_cross() {
  if command -v qemu-aarch64 > /dev/null && command -v aarch64-linux-gnu-g++ > /dev/null; then return; fi
  [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null || return 1
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends qemu-user \
    g++-aarch64-linux-gnu libc6-dev-arm64-cross; } > /dev/null 2>&1
}

arm() {
  if ! install_cross; then
    echo "skipped: ARM kernels need qemu-aarch64 and aarch64-linux-gnu-g++, which cannot be installed here"
    return
  fi
  local folder=$build/arm cxx=aarch64-linux-gnu-g++ processor
  mkdir -p $folder
  {
    compile $cxx $folder neon
    compile $cxx $folder neondot -march=armv8.2-a+dotprod
    compile $cxx $folder neoni8mm -march=armv8.2-a+dotprod+i8mm
    compile $cxx $folder portable -DPACELINE_PLAIN
    check_program $cxx $folder portable neon neondot neoni8mm
    for source in native/kernels/isa native/kernels/packed tests/native/isas; do
      printf '%q ' $cxx "${flags[@]}" -c $source.cpp -o "$folder/$(basename $source).o"
      echo
    done
  } | jobs
  local kernels=($folder/{neon,neondot,neoni8mm,portable}.*.o)
  $cxx -static -o $folder/check "${kernels[@]}" $folder/{kernel_check,check_*}.o
  $cxx -static -o $folder/isas "${kernels[@]}" $folder/{isa,isas,packed}.o
  expect() {
    local found
    found=$(qemu-aarch64 -cpu "$1" $folder/isas)
    [ "$found" = "$2 " ] || { echo "$1 takes '$found', expected '$2'"; exit 1; }
  }
  expect cortex-a53 "neon portable"
  expect cortex-a76 "neondot neon portable"
  expect max "neoni8mm neondot neon portable"
  qemu-aarch64 -cpu max $folder/check | tee $folder/log
}

vnni() {
  local folder=$build/vnni cxx=${CXX:-g++} avx2=(-mavx2 -mfma -mf16c) sed_script=
  if grep -qw avx_vnni /proc/cpuinfo 2> /dev/null; then
    :
  elif grep -w avx512_vnni /proc/cpuinfo 2> /dev/null | grep -qw avx512vl; then
    sed_script='s/{vex} *vpdp/vpdp/'
  else
    echo "skipped: this machine has neither AVX-VNNI nor AVX-512 VNNI"
    return
  fi
  mkdir -p $folder
  # These two sets differ in two instructions, which few formats use in all ways.
  [ "${FORMATS:-}" = all ] || flags+=("-UGGUF_FORMATS"
    "-DGGUF_FORMATS(USE)=USE(Q8_0,q8_0) USE(Q2K,q2_k) USE(Q5K,q5_k)")
  {
    compile "$cxx" $folder avx2 "${avx2[@]}"
    local source
    for source in "${sources[@]}"; do
      printf '%q ' "$cxx" "${flags[@]}" "${avx2[@]}" -mavxvnni -DPACELINE_ISA=avxvnni -S \
        "native/kernels/$source.cpp" -o "$folder/$source.s"
      printf '&& sed -i %q %q && %q -c %q -o %q\n' "$sed_script" "$folder/$source.s" "$cxx" \
        "$folder/$source.s" "$folder/avxvnni.$source.o"
    done
    check_program "$cxx" $folder avx2 avxvnni
  } | jobs
  "$cxx" -o $folder/check $folder/{avx2,avxvnni}.*.o $folder/{kernel_check,check_*}.o
  [ -z "$sed_script" ] || echo "AVX-VNNI in the form of AVX-512:"
  $folder/check | tee $folder/log
}

# digests FOLDER   what a comparison printed of results that do not depend on FORMATS
digests() { sed -n 's/^\(attention\|rows\|screen\):.*\(digest.*\)/\1 \2/p' "$build/$1/log"; }

rm -f $build/*/log
[ $# -gt 0 ] || set -- arm vnni
for part in "$@"; do
  case "$part" in
    arm | vnni) $part ;;
    *) echo "unknown part '$part'; choose arm or vnni" >&2; exit 2 ;;
  esac
done
if [ -e $build/arm/log ] && [ -e $build/vnni/log ]; then
  [ "$(digests arm)" = "$(digests vnni)" ] || { echo "ARM and x86 have other results"; exit 1; }
  echo "ARM and x86 have the same results"
fi
