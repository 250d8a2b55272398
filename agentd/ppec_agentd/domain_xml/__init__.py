# SPDX-License-Identifier: Apache-2.0
"""libvirt's domain XML: one small declarative file per element group to build it, one to read it back. Pure.

`build.domain_xml` turns a `DomainDefinition` into the document, `observe.observe` reads what libvirt shows of a domain.
"""
