#   docker build -t babyseg:0.1.0 .
#   docker build -t babyseg:0.1.0-cuda --build-arg TORCH=cuda .
#   docker run --rm -u "$(id -u):$(id -g)" --network none --read-only --tmpfs /tmp \
#       -v /my/bids:/data:ro -v /my/out:/out -v /my/scratch:/work \
#       babyseg:0.1.0 /data /out participant -w /work

# Any Debian-like image with Python 3.11 to 3.13 and `python3 -m venv`.
ARG BASE_IMAGE=python:3.11.13-slim-bookworm

FROM ${BASE_IMAGE} AS build
# cpu or cuda. The CUDA libraries come with torch; the base image needs none, the host a driver.
ARG TORCH=cpu
# Where the CPU build of torch comes from if pip's own index has none.
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# For `strip`: without it the image is larger by 100 MB, and not worse.
RUN command -v strip >/dev/null \
    || { apt-get update && apt-get install -y --no-install-recommends binutils; } \
    || echo "binutils cannot be installed"
RUN python3 -m venv /opt/babyseg
WORKDIR /src
# The dependencies come first: a change of the source alone leaves this layer as it is.
COPY requirements/install.sh requirements/lock.txt requirements/
RUN sh requirements/install.sh /opt/babyseg/bin/python "${TORCH}" requirements/lock.txt
COPY requirements/prune.sh requirements/
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY babyseg_bids/ babyseg_bids/
COPY workflows/ workflows/
COPY synthesis/ synthesis/
# pip compiles what it installs, which matters because nobody may write there later.
RUN /opt/babyseg/bin/python -m pip install --no-deps --no-build-isolation . \
    && sh requirements/prune.sh /opt/babyseg/bin/python \
    && chmod -R a+rX /opt/babyseg

FROM ${BASE_IMAGE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="babyseg" \
      org.opencontainers.image.description="Segmentation of infant brain MRI as a BIDS App" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.authors="The babyseg developers" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.bids.app.name="babyseg" \
      org.bids.app.version="${VERSION}"
COPY --from=build /opt/babyseg /opt/babyseg
# HOME may be unset or unwritable: nothing of babyseg depends on it. NO_ET silences the version
# check of nipype.
ENV PATH=/opt/babyseg/bin:$PATH \
    LC_ALL=C.UTF-8 \
    NO_ET=1 \
    BABYSEG_IMAGE=babyseg:${VERSION} \
    MPLBACKEND=Agg \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONNOUSERSITE=1 \
    PYTHONUNBUFFERED=1
# Mount points: an old singularity cannot make them. /version is where BIDS Apps keep theirs. The
# image is complete only if the program starts as nobody, without a home, in this version.
RUN mkdir /data /out /work /inputs \
    && echo "${VERSION}" >/version \
    && said=$(HOME=/nonexistent setpriv --reuid 65534 --clear-groups babyseg --version) \
    && test "$said" = "babyseg ${VERSION}"
# Any other user will do: docker run -u "$(id -u):$(id -g)".
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["babyseg"]
