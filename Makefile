# PGXS around cargo: `make`, `make install`, `make installcheck` as with every extension. `make run` and `make test` set
# a fresh Debian machine up by themselves.

PG_CONFIG ?= pg_config
PROFILE ?= release
CARGO ?= cargo

EXTENSION = imbus
DATA = $(wildcard sql/imbus--*.sql)
# Where pg_regress writes: user postgres may not write into somebody else's checkout.
OUTPUTDIR ?= $(shell test -w tests && echo tests/output || echo "$${TMPDIR:-/tmp}/imbus-installcheck-$$(id -u)")
# pg_regress and isolation specs against the running server of PGHOST and PGPORT. Which tests: asked of the server when
# they run, since those of the workers need a server that preloads imbus.
REGRESS = $(shell scripts/regress_tests '$(bindir)/psql' sql)
REGRESS_OPTS = --inputdir=tests --outputdir='$(OUTPUTDIR)' --load-extension=imbus
ISOLATION = $(shell scripts/regress_tests '$(bindir)/psql' specs)
ISOLATION_OPTS = --inputdir=tests --outputdir='$(OUTPUTDIR)/isolation' --load-extension=imbus

# Commands that must work before PostgreSQL is installed.
ifneq (,$(filter run test lint unit setup soak bench conformance fuzz test-page test-odoo,$(MAKECMDGOALS)))

.PHONY: run test lint unit setup soak bench conformance fuzz test-page test-odoo
setup:
	scripts/setup
test-odoo:
	scripts/test_odoo
test-page:
	scripts/test_page
run:
	scripts/setup
	scripts/run
test:
	scripts/setup
	scripts/test
soak:
	scripts/setup
	scripts/soak
conformance:
	scripts/setup
	scripts/conformance
fuzz:
	scripts/setup
	scripts/fuzz
lint:
	scripts/lint
unit:
	$(CARGO) test --no-default-features --lib
bench:
	scripts/setup
	bench/publish
	bench/latency

else

PG_MAJOR := $(shell $(PG_CONFIG) --version | sed -E 's/[^0-9]*([0-9]+).*/\1/')
PROFILE_DIR = $(if $(filter dev,$(PROFILE)),debug,$(PROFILE))
TARGET_DIR = $(or $(CARGO_TARGET_DIR),target)
LIBRARY = $(TARGET_DIR)/$(PROFILE_DIR)/libimbus.so
CARGO_FLAGS = --lib --profile $(PROFILE) --no-default-features --features pg$(PG_MAJOR)

all: library

EXTRA_CLEAN = $(OUTPUTDIR)

PGXS := $(shell $(PG_CONFIG) --pgxs)
include $(PGXS)

# `sudo make install` after `make` takes what was built: root may have no cargo, and must leave no files of its own in
# the other user's target folder.
.PHONY: library cargo-clean
library:
	@if [ -n "$(filter install,$(MAKECMDGOALS))" ] && [ -f '$(LIBRARY)' ] && \
	    { [ ! -O '$(LIBRARY)' ] || ! command -v $(CARGO) >/dev/null; }; then \
	    echo "installing $(LIBRARY) as it was built"; \
	else \
	    PGRX_PG_CONFIG_PATH="$$(command -v $(PG_CONFIG))" $(CARGO) build $(CARGO_FLAGS); \
	fi

# The library is built by cargo; PGXS installs the rest. `install -c` replaces the file, so that a running server keeps
# the one it has loaded.
install: install-library
.PHONY: install-library uninstall-library
install-library: installdirs-library
	@test -f $(LIBRARY) || { echo "$(LIBRARY) is missing: run make first" >&2; exit 1; }
	$(INSTALL_SHLIB) $(LIBRARY) '$(DESTDIR)$(pkglibdir)/imbus.so'
.PHONY: installdirs-library
installdirs-library:
	$(MKDIR_P) '$(DESTDIR)$(pkglibdir)'
uninstall: uninstall-library
uninstall-library:
	rm -f '$(DESTDIR)$(pkglibdir)/imbus.so'

# pg_regress runs as the user that calls make; its output folder must be writable for that user.
installcheck: regress-output
.PHONY: regress-output
regress-output:
	@mkdir -p '$(OUTPUTDIR)'

clean: cargo-clean
cargo-clean:
	rm -rf $(TARGET_DIR)

endif
