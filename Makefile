# PGXS around cargo: `make`, `make install`, `make installcheck` as with every extension. `make run` and `make test` set
# a fresh Debian machine up by themselves.

PG_CONFIG ?= pg_config
PROFILE ?= release
CARGO ?= cargo

EXTENSION = imbus
DATA = $(wildcard sql/imbus--*.sql)
REGRESS_OPTS = --inputdir=tests --outputdir=$(or $(OUTPUTDIR),tests/output)
ISOLATION = rollback_savepoint late_commit
ISOLATION_OPTS = --inputdir=tests --outputdir=$(or $(OUTPUTDIR),tests/output)

# Commands that must work before PostgreSQL is installed.
ifneq (,$(filter run test soak lint unit setup,$(MAKECMDGOALS)))

.PHONY: run test lint unit setup
setup:
	scripts/setup
run:
	scripts/setup
	scripts/run
test:
	scripts/setup
	scripts/test
lint:
	scripts/lint
unit:
	$(CARGO) test --no-default-features --lib

else

PG_MAJOR := $(shell $(PG_CONFIG) --version | sed -E 's/[^0-9]*([0-9]+).*/\1/')
PROFILE_DIR = $(if $(filter dev,$(PROFILE)),debug,$(PROFILE))
TARGET_DIR = $(or $(CARGO_TARGET_DIR),target)
LIBRARY = $(TARGET_DIR)/$(PROFILE_DIR)/libimbus.so
CARGO_FLAGS = --lib --profile $(PROFILE) --no-default-features --features pg$(PG_MAJOR)

all: library

EXTRA_CLEAN = tests/output

PGXS := $(shell $(PG_CONFIG) --pgxs)
include $(PGXS)

.PHONY: library cargo-clean
library:
	PGRX_PG_CONFIG_PATH="$(shell command -v $(PG_CONFIG))" $(CARGO) build $(CARGO_FLAGS)

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

# Against the running server of PGHOST and PGPORT, as every PGXS extension. The tests of the workers run where the
# server preloads imbus.
installcheck:
	PG_REGRESS='$(pg_regress_installcheck)' PG_ISOLATION='$(pg_isolation_regress_installcheck)' \
	    BINDIR='$(bindir)' OUTPUTDIR='$(or $(OUTPUTDIR),tests/output)' ISOLATION='$(ISOLATION)' scripts/installcheck

clean: cargo-clean
cargo-clean:
	rm -rf $(TARGET_DIR)

endif
