//! `text` and `jsonb` as Rust strings, converted between the database's encoding and UTF-8. jsonb stays text: a parsed
//! value would lose big numbers.

use pgrx::callconv::{Arg, ArgAbi, BoxRet, FcInfo};
use pgrx::datum::UnboxDatum;
use pgrx::nullable::Nullable;
use pgrx::pg_sys::{self, Datum};
use pgrx::pgrx_sql_entity_graph::metadata::{
    ArgumentError, ReturnsError, ReturnsRef, SqlMappingRef, SqlTranslatable, TypeOrigin,
};
use pgrx::{FromDatum, IntoDatum};
use std::ffi::{CStr, CString, c_char, c_int};

/// A `text` or `varchar` value in UTF-8.
#[derive(Clone, Debug)]
pub struct Text(pub String);

/// A `jsonb` value as its text in UTF-8.
#[derive(Clone, Debug)]
pub struct JsonbText(pub String);

/// Bytes in the server's encoding as UTF-8. Raises 22P05 where PostgreSQL cannot convert.
fn to_utf8(bytes: &[u8]) -> String {
    let utf8 = pg_sys::pg_enc::PG_UTF8 as c_int;
    // SAFETY: the conversion reads `len` bytes and answers the same pointer or a palloc'd C string.
    unsafe {
        if pg_sys::GetDatabaseEncoding() == utf8 {
            return String::from_utf8_lossy(bytes).into_owned();
        }
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
fn from_utf8(text: &str) -> Vec<u8> {
    let utf8 = pg_sys::pg_enc::PG_UTF8 as c_int;
    // SAFETY: as in `to_utf8`.
    unsafe {
        if pg_sys::GetDatabaseEncoding() == utf8 {
            return text.as_bytes().to_vec();
        }
        let len = c_int::try_from(text.len()).unwrap_or(c_int::MAX);
        let from = text.as_ptr().cast::<c_char>();
        let to = pg_sys::pg_any_to_server(from, len, utf8);
        if std::ptr::eq(to, from) { text.as_bytes().to_vec() } else { CStr::from_ptr(to).to_bytes().to_vec() }
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

impl IntoDatum for Text {
    fn into_datum(self) -> Option<Datum> {
        let bytes = from_utf8(&self.0);
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
        let text = CString::new(bytes).unwrap_or_else(|_| CString::from(c""));
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
