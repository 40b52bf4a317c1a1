//! `text` and `jsonb` as Rust strings, converted between the database's encoding and UTF-8. jsonb stays text, as a parsed
//! value would lose big numbers, or is handed on as it is stored.

use pgrx::callconv::{Arg, ArgAbi, BoxRet, FcInfo};
use pgrx::datum::UnboxDatum;
use pgrx::nullable::Nullable;
use pgrx::pg_sys::{self, Datum};
use pgrx::pgrx_sql_entity_graph::metadata::{
    ArgumentError, ReturnsError, ReturnsRef, SqlMappingRef, SqlTranslatable, TypeOrigin,
};
use pgrx::{FromDatum, IntoDatum};
use std::borrow::Cow;
use std::cell::Cell;
use std::ffi::{CStr, CString, c_char, c_int};

/// A `text` or `varchar` value in UTF-8.
#[derive(Clone, Debug)]
pub struct Text(pub String);

/// A `text` value of somebody else's.
#[derive(Clone, Copy, Debug)]
pub struct Str<'a>(pub &'a str);

/// A `jsonb` value as its text in UTF-8.
#[derive(Clone, Debug)]
pub struct JsonbText(pub String);

/// A `jsonb` value as it is stored: with a varlena header of four bytes, uncompressed.
#[derive(Clone, Debug)]
pub struct Jsonb(Box<[u32]>);

impl Jsonb {
    /// The value of a JSON text in UTF-8. Raises what PostgreSQL raises for one that jsonb cannot hold.
    pub fn parse(text: &str) -> Jsonb {
        let datum = JsonbText(text.to_owned()).into_datum();
        // SAFETY: just made.
        datum.and_then(|datum| unsafe { Jsonb::from_datum(datum, false) }).unwrap_or_else(|| Jsonb(Box::default()))
    }

    /// The value itself, not a copy: for as long as this lives.
    pub fn datum(&self) -> Datum {
        Datum::from(self.0.as_ptr())
    }

    /// In bytes.
    pub fn size(&self) -> usize {
        size_of_val(&*self.0)
    }

    /// As JSON text in UTF-8.
    pub fn text(&self) -> String {
        // SAFETY: what stands here is a jsonb.
        unsafe { JsonbText::from_datum(self.datum(), false) }.map(|json| json.0).unwrap_or_default()
    }

    /// How many elements the array has; None when it is none.
    pub fn array_len(&self) -> Option<usize> {
        self.len_of(pg_sys::JB_FARRAY).filter(|_| self.header() & pg_sys::JB_FSCALAR == 0)
    }

    /// How many members the object has; None when it is none.
    pub fn object_len(&self) -> Option<usize> {
        self.len_of(pg_sys::JB_FOBJECT)
    }

    /// Of the container at the root (utils/jsonb.h).
    fn header(&self) -> u32 {
        self.0.get(1).copied().unwrap_or(0)
    }

    fn len_of(&self, kind: u32) -> Option<usize> {
        let is_kind = self.header() & kind != 0;
        is_kind.then(|| usize::try_from(self.header() & pg_sys::JB_CMASK).unwrap_or(0))
    }
}

thread_local! {
    /// What `is_utf8` has found out.
    static IS_UTF8: Cell<Option<bool>> = const { Cell::new(None) };
}

/// Whether the database's encoding is UTF-8, so that nothing is to be converted.
fn is_utf8() -> bool {
    IS_UTF8.get().unwrap_or_else(|| {
        // SAFETY: plain values of the session. A process stays with its database; before it has one, nothing is known.
        let (encoding, database) = unsafe { (pg_sys::GetDatabaseEncoding(), pg_sys::MyDatabaseId) };
        let is_utf8 = encoding == pg_sys::pg_enc::PG_UTF8 as c_int;
        if database != pg_sys::InvalidOid {
            IS_UTF8.set(Some(is_utf8));
        }
        is_utf8
    })
}

/// Bytes in the server's encoding as UTF-8. Raises 22P05 where PostgreSQL cannot convert.
fn to_utf8(bytes: &[u8]) -> String {
    if is_utf8() {
        return String::from_utf8_lossy(bytes).into_owned();
    }
    let utf8 = pg_sys::pg_enc::PG_UTF8 as c_int;
    // SAFETY: the conversion reads `len` bytes and answers the same pointer or a palloc'd C string.
    unsafe {
        let len = c_int::try_from(bytes.len()).unwrap_or(c_int::MAX);
        let from = bytes.as_ptr().cast::<c_char>();
        let to = pg_sys::pg_server_to_any(from, len, utf8);
        if std::ptr::eq(to, from) {
            String::from_utf8_lossy(bytes).into_owned()
        } else {
            CStr::from_ptr(to).to_string_lossy().into_owned()
        }
    }
}

/// UTF-8 as bytes in the server's encoding. Raises 22P05 where PostgreSQL cannot convert.
fn from_utf8(text: &str) -> Cow<'_, [u8]> {
    if is_utf8() {
        return Cow::Borrowed(text.as_bytes());
    }
    let utf8 = pg_sys::pg_enc::PG_UTF8 as c_int;
    // SAFETY: as in `to_utf8`.
    unsafe {
        let len = c_int::try_from(text.len()).unwrap_or(c_int::MAX);
        let from = text.as_ptr().cast::<c_char>();
        let to = pg_sys::pg_any_to_server(from, len, utf8);
        if std::ptr::eq(to, from) {
            Cow::Borrowed(text.as_bytes())
        } else {
            Cow::Owned(CStr::from_ptr(to).to_bytes().to_vec())
        }
    }
}

impl FromDatum for Text {
    unsafe fn from_polymorphic_datum(datum: Datum, is_null: bool, _: pg_sys::Oid) -> Option<Text> {
        // SAFETY: the caller passes a varlena of text; the detoasted copy lives in the current memory context.
        (!is_null).then(|| unsafe {
            let varlena = pg_sys::pg_detoast_datum_packed(datum.cast_mut_ptr());
            Text(to_utf8(pgrx::varlena::varlena_to_byte_slice(varlena)))
        })
    }
}

// SAFETY: as FromDatum, which copies.
unsafe impl UnboxDatum for Text {
    type As<'src> = Text;

    unsafe fn unbox<'src>(datum: pgrx::datum::Datum<'src>) -> Text
    where
        Self: 'src,
    {
        // SAFETY: the caller passes a varlena of text.
        let text = unsafe { Text::from_polymorphic_datum(datum.sans_lifetime(), false, pg_sys::TEXTOID) };
        text.unwrap_or_else(|| Text(String::new()))
    }
}

impl FromDatum for JsonbText {
    unsafe fn from_polymorphic_datum(datum: Datum, is_null: bool, _: pg_sys::Oid) -> Option<JsonbText> {
        // SAFETY: the caller passes a jsonb; jsonb_out answers a palloc'd C string in the server's encoding.
        (!is_null).then(|| unsafe {
            let text = pgrx::direct_function_call::<&CStr>(pg_sys::jsonb_out, &[Some(datum)]);
            JsonbText(to_utf8(text.map(CStr::to_bytes).unwrap_or_default()))
        })
    }
}

impl FromDatum for Jsonb {
    unsafe fn from_polymorphic_datum(datum: Datum, is_null: bool, _: pg_sys::Oid) -> Option<Jsonb> {
        // SAFETY: the caller passes a jsonb; detoasted, it has a header of four bytes, which says how long it is, and is
        // aligned like one. What lies behind its last word is padded.
        (!is_null).then(|| unsafe {
            let varlena = pg_sys::pg_detoast_datum(datum.cast_mut_ptr());
            let length = pgrx::varlena::varsize_any(varlena);
            let mut words = vec![0_u32; length.div_ceil(size_of::<u32>())].into_boxed_slice();
            std::ptr::copy_nonoverlapping(varlena.cast::<u8>(), words.as_mut_ptr().cast::<u8>(), length);
            Jsonb(words)
        })
    }
}

impl IntoDatum for Jsonb {
    fn into_datum(self) -> Option<Datum> {
        (&self).into_datum()
    }

    fn type_oid() -> pg_sys::Oid {
        pg_sys::JSONBOID
    }
}

impl IntoDatum for &Jsonb {
    fn into_datum(self) -> Option<Datum> {
        let length = size_of_val(&*self.0);
        // SAFETY: a copy of as many bytes.
        unsafe {
            let copy = pg_sys::palloc(length).cast::<u8>();
            std::ptr::copy_nonoverlapping(self.0.as_ptr().cast::<u8>(), copy, length);
            Some(Datum::from(copy))
        }
    }

    fn type_oid() -> pg_sys::Oid {
        pg_sys::JSONBOID
    }
}

impl IntoDatum for Text {
    fn into_datum(self) -> Option<Datum> {
        Str(&self.0).into_datum()
    }

    fn type_oid() -> pg_sys::Oid {
        pg_sys::TEXTOID
    }
}

impl IntoDatum for Str<'_> {
    fn into_datum(self) -> Option<Datum> {
        let bytes = from_utf8(self.0);
        // SAFETY: cstring_to_text_with_len copies `len` bytes.
        unsafe {
            let len = c_int::try_from(bytes.len()).unwrap_or(c_int::MAX);
            Some(pg_sys::cstring_to_text_with_len(bytes.as_ptr().cast::<c_char>(), len).into())
        }
    }

    fn type_oid() -> pg_sys::Oid {
        pg_sys::TEXTOID
    }
}

impl IntoDatum for JsonbText {
    fn into_datum(self) -> Option<Datum> {
        // JSON text holds no NUL (json::check); one that did would be cut and refused by jsonb_in.
        let bytes = from_utf8(&self.0);
        let text = CString::new(bytes.into_owned()).unwrap_or_else(|_| CString::from(c""));
        // SAFETY: jsonb_in reads a C string in the server's encoding and answers a palloc'd jsonb, or raises.
        unsafe { pgrx::direct_function_call_as_datum(pg_sys::jsonb_in, &[Some(Datum::from(text.as_ptr()))]) }
    }

    fn type_oid() -> pg_sys::Oid {
        pg_sys::JSONBOID
    }
}

macro_rules! sql_type {
    ($type:ty, $sql:literal) => {
        // SAFETY: the value is read by FromDatum alone, which copies.
        unsafe impl<'fcx> ArgAbi<'fcx> for $type {
            unsafe fn unbox_arg_unchecked(arg: Arg<'_, 'fcx>) -> Self {
                unsafe { arg.unbox_arg_using_from_datum() }.unwrap_or_else(|| pgrx::error!("unexpected null argument"))
            }

            unsafe fn unbox_nullable_arg(arg: Arg<'_, 'fcx>) -> Nullable<Self> {
                unsafe { arg.unbox_arg_using_from_datum().into() }
            }
        }

        // SAFETY: the datum comes from IntoDatum in the current memory context.
        unsafe impl BoxRet for $type {
            unsafe fn box_into<'fcx>(self, fcinfo: &mut FcInfo<'fcx>) -> pgrx::datum::Datum<'fcx> {
                match self.into_datum() {
                    Some(datum) => unsafe { fcinfo.return_raw_datum(datum) },
                    None => fcinfo.return_null(),
                }
            }
        }

        // SAFETY: the SQL scripts are written by hand; this names the type only for pgrx's bounds.
        unsafe impl SqlTranslatable for $type {
            const TYPE_IDENT: &'static str = pgrx::pgrx_resolved_type!($type);
            const TYPE_ORIGIN: TypeOrigin = TypeOrigin::External;
            const ARGUMENT_SQL: Result<SqlMappingRef, ArgumentError> = Ok(SqlMappingRef::literal($sql));
            const RETURN_SQL: Result<ReturnsRef, ReturnsError> = Ok(ReturnsRef::One(SqlMappingRef::literal($sql)));
        }
    };
}

sql_type!(Text, "text");
sql_type!(JsonbText, "jsonb");
sql_type!(Jsonb, "jsonb");
